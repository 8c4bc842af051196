"use strict";
// Which view is shown, by the address, and the keys.

async function attempt(work) {
  try {
    const found = await work();
    element("problem").hidden = true;
    return found;
  } catch (error) {
    element("problem").textContent = error.message;
    element("problem").hidden = false;
    return null;
  }
}

function route() {
  const found = location.hash.match(/^#clip=(\d{1,9})$/);
  element("list").hidden = Boolean(found);
  element("clip").hidden = !found;
  if (found) return showClip(Number(found[1]));
  clipAsked++;
  stop();
  const before = listed.findIndex(clip => clip.row === view.row);
  return Promise.all([showList({ focus: before < 0 ? null : before }), showHistograms()]);
}

function goTo(step) {
  const at = listed.findIndex(clip => clip.row === view.row);
  const target = at < 0 ? null : listed[at + step];
  if (target) location.hash = `#clip=${target.row}`;
}

function describe(state) {
  element("title").textContent = state.cache;
  const kinds = [...new Set(state.stores.map(store => store.kind))].join(", ");
  element("about").textContent = [
    `${count(state.stored)} clips${kinds && ` (${kinds})`}`, `${count(state.skipped)} skipped`,
    state.left_out ? `${count(state.left_out)} on the list to leave out` : "",
    state.no_dataset ? `no frames: ${state.no_dataset}` : "",
  ].filter(Boolean).join("; ");
  element("reading").textContent = state.finished ? "" :
    `${count(state.read)} of ${count(state.stored)} records read; order and filters know these` +
    (state.index_command ? `. Next time at once, after: ${state.index_command}` : "");
  if (state.problems.length) element("reading").textContent += ` ${state.problems.join("; ")}`;
  showCommands(state);
}

async function watch() {
  const state = await attempt(() => source.state());
  if (!state) return;
  describe(state);
  if (state.finished) {
    if (element("clip").hidden) { showList({ focus: focusedCard() < 0 ? null : focusedCard() }); showHistograms(); }
  } else setTimeout(watch, 1000);
}

const listKeys = {
  "/": () => element("search").focus(),
  ArrowRight: () => moveFocus(1),
  ArrowLeft: () => moveFocus(-1),
  ArrowDown: () => moveFocus(cardsPerRow()),
  ArrowUp: () => moveFocus(-cardsPerRow()),
  PageDown: () => turnPage(1, 0),
  PageUp: () => turnPage(-1, 0),
};

function moveFocus(step) {
  const at = focusedCard();
  if (at < 0) return focusCard(0);
  if (at + step >= listed.length && query.offset + listed.length < matching) return turnPage(1, 0);
  if (at + step < 0 && query.offset) return turnPage(-1, -1);
  return focusCard(at + step);
}

const clipKeys = {
  " ": togglePlay,
  ArrowRight: event => event.shiftKey ? moveToken(0, 1) : step(1),
  ArrowLeft: event => event.shiftKey ? moveToken(0, -1) : step(-1),
  ArrowDown: event => event.shiftKey ? moveToken(1, 0) : goTo(1),
  ArrowUp: event => event.shiftKey ? moveToken(-1, 0) : goTo(-1),
  Escape: () => { location.hash = ""; },
  "/": () => { location.hash = ""; element("search").focus(); },
};

function step(frames) {
  stop();
  showFrame(view.frame + frames);
}

function moveToken(rows, columns) {
  if (view.token) setToken(view.token[0] + rows, view.token[1] + columns);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input:not([type=checkbox]), select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const inClip = !element("clip").hidden, keys = inClip ? clipKeys : listKeys;
  // Space presses the button or box that has the focus.
  if (event.key === " " && event.target.closest?.("button, input, summary")) return;
  if (!(event.key in keys) || (inClip && !view.clip)) return;
  event.preventDefault();
  keys[event.key](event);
});

let searchTimer = null;
element("search").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(() => { query.search = element("search").value; changed(); }, 200);
});
element("show").addEventListener("change", () => { query.show = element("show").value; changed(); });
element("sort").addEventListener("change", () => { query.sort = element("sort").value; query.offset = 0; showList(); });
element("clear").addEventListener("click", () => {
  Object.assign(query, { search: "", ranges: {}, labels: {} });
  element("search").value = "";
  changed();
});
element("earlier").addEventListener("click", () => turnPage(-1));
element("later").addEventListener("click", () => turnPage(1));
element("back").addEventListener("click", () => { location.hash = ""; });
element("previous").addEventListener("click", () => goTo(-1));
element("next").addEventListener("click", () => goTo(1));
element("leave").addEventListener("click", toggleLeftOut);
element("play").addEventListener("click", togglePlay);
element("frame").addEventListener("input", () => { stop(); showFrame(Number(element("frame").value)); });
for (const id of ["forward", "backward"]) element(id).addEventListener("change", draw);
element("direction").addEventListener("change", () => {
  view.direction = element("direction").value;
  view.motions = {};
  askWindow();
  askMotion();
});
element("timestep").addEventListener("change", () => {
  Object.assign(view, { windows: {}, motions: { teacher: view.motions.teacher } });
  askStudent();
});
element("temperature").addEventListener("input", () => {
  view.temperature = 10 ** Number(element("temperature").value);
  showTemperature();
  askWindow();
  askMotion();
});
addEventListener("hashchange", route);

async function begin() {
  const state = await attempt(() => source.state());
  if (!state) return;
  describe(state);
  view.temperature = state.temperature;
  view.colours = state.mask_colours;
  view.student = state.student;
  element("timestep").replaceChildren(...(state.student?.timesteps || []).map(value =>
    make("option", { value }, String(value))));
  const orders = [["", "by key"]];
  for (const [name, title] of Object.entries(state.columns.numbers))
    orders.push([name, `${title}, lowest first`], [`-${name}`, `${title}, highest first`]);
  element("sort").replaceChildren(...orders.map(([value, text]) => make("option", { value }, text)));
  if (!source.live) document.body.classList.add("saved");
  await route();
  if (!state.finished) setTimeout(watch, 1000);
}

begin();
