"use strict";
// The list of clips: search, filters, order, pages, and histograms that can be brushed.

const element = id => document.getElementById(id);
const PAGE = 60;
const query = { show: "stored", search: "", sort: "", ranges: {}, labels: {}, offset: 0 };
let listed = [], matching = 0, asked = 0;

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children);  // strings become text, never markup
  return made;
}

function parameters() {
  const found = new URLSearchParams({ show: query.show, search: query.search, sort: query.sort });
  for (const [name, [low, high]] of Object.entries(query.ranges))
    found.append("range", `${name}:${low}:${high}`);
  for (const [name, word] of Object.entries(query.labels)) found.append("label", `${name}:${word}`);
  return found;
}

async function showList({ focus = null } = {}) {
  const mine = ++asked, wanted = parameters();
  wanted.set("offset", query.offset);
  wanted.set("limit", PAGE);
  const found = await attempt(() => source.clips(wanted));
  if (!found || mine !== asked) return;
  if (!found.clips.length && query.offset && found.matching) {
    query.offset = Math.floor((found.matching - 1) / PAGE) * PAGE;
    return showList({ focus });
  }
  listed = found.clips;
  matching = found.matching;
  const first = matching ? found.offset + 1 : 0;
  element("place").textContent = matching
    ? `${count(first)} to ${count(found.offset + listed.length)} of ${count(matching)} clips`
    : "no clip";
  element("earlier").disabled = found.offset === 0;
  element("later").disabled = found.offset + listed.length >= matching;
  element("cards").replaceChildren(...listed.map(card));
  if (focus !== null) focusCard(focus < 0 ? listed.length - 1 : focus);
}

const count = number => number.toLocaleString("en");
const short = value => Number.isInteger(value) ? String(value) : value.toPrecision(3);

function card(clip) {
  const picture = make("img", { alt: "", loading: "lazy", src: source.still(clip.row) });
  picture.addEventListener("error", () => picture.classList.add("absent"));
  const link = make("a", { href: `#clip=${clip.row}` }, picture,
    make("div", { class: "name" }, clip.key));
  if (clip.caption) link.append(make("div", { class: "caption", title: clip.caption }, clip.caption));
  link.append(make("div", { class: "note" }, summary(clip)));
  if (clip.left_out) link.classList.add("left-out");
  const move = moving => { picture.src = moving ? source.loop(clip.row) : source.still(clip.row); };
  link.addEventListener("pointerenter", () => move(true));
  link.addEventListener("pointerleave", () => move(false));
  link.addEventListener("focus", () => move(true));
  link.addEventListener("blur", () => move(false));
  return make("li", {}, link);
}

function summary(clip) {
  const { numbers, labels } = clip, said = [];
  if (labels.reason) said.push(`${labels.reason}: ${clip.detail}`);
  if (numbers.quality !== null) said.push(`consistency ${numbers.quality.toFixed(2)}`);
  if (numbers.lost) said.push(`${numbers.lost} frames lost`);
  if (labels.prompt) said.push(labels.prompt);
  if (numbers.confidence !== null) said.push(`confidence ${numbers.confidence.toFixed(2)}`);
  if (clip.left_out) said.push("to be left out");
  return said.join(", ");
}

function focusCard(index) {
  const links = element("cards").querySelectorAll("a");
  if (links.length) links[Math.min(Math.max(index, 0), links.length - 1)].focus();
}

function focusedCard() {
  const link = document.activeElement?.closest("#cards a");
  return link ? [...element("cards").querySelectorAll("a")].indexOf(link) : -1;
}

function cardsPerRow() {
  const tops = [...element("cards").children].map(item => item.offsetTop);
  const other = tops.findIndex(top => top !== tops[0]);
  return other < 0 ? Math.max(tops.length, 1) : other;
}

function turnPage(pages, focus = null) {
  const offset = query.offset + pages * PAGE;
  if (offset < 0 || offset >= matching) return;
  query.offset = offset;
  showList({ focus });
}

function changed() {
  query.offset = 0;
  showList();
  showHistograms();
}

async function showHistograms() {
  const found = await attempt(() => source.histograms(parameters()));
  if (!found || document.activeElement?.closest("#histograms input")) return;
  const charts = Object.entries(found.numbers).map(([name, one]) => histogram(name, one));
  const words = Object.entries(found.labels).map(([name, one]) => wordList(name, one));
  element("histograms").replaceChildren(...charts, ...words.filter(Boolean));
  element("filters").hidden = !charts.length && !words.length;
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function histogram(name, { title, low, high, counts, missing }) {
  const most = Math.max(...counts, 1), bins = counts.length, range = query.ranges[name];
  const chart = svg("svg", { viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${title}: ${short(low)} to ${short(high)}` });
  const at = bin => low + (high - low) * bin / bins;
  counts.forEach((number, bin) => {
    const height = number ? Math.max(2, 100 * number / most) : 0;
    const bar = svg("rect", { x: bin + 0.06, width: 0.88, y: 100 - height, height });
    if (range && at(bin + 1) > range[0] && at(bin) <= range[1]) bar.classList.add("chosen");
    chart.append(bar);
  });
  const brush = svg("rect", { class: "brush", y: 0, height: 100, x: 0, width: 0 });
  chart.append(brush);
  let from = null;
  const place = event => {
    const box = chart.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * bins;
  };
  chart.addEventListener("pointerdown", event => {
    from = place(event);
    try { chart.setPointerCapture(event.pointerId); } catch (error) { }
  });
  chart.addEventListener("pointermove", event => {
    if (from === null) return;
    brush.setAttribute("x", Math.min(from, place(event)));
    brush.setAttribute("width", Math.abs(place(event) - from));
  });
  chart.addEventListener("pointerup", event => {
    if (from === null) return;
    const [first, last] = [from, place(event)].sort((a, b) => a - b);
    from = null;
    // A click takes the bin under the pointer.
    setRange(name, at(Math.floor(first)), at(Math.max(Math.ceil(last), Math.floor(first) + 1)));
  });
  chart.addEventListener("pointercancel", () => { from = null; brush.setAttribute("width", 0); });
  const inputs = [0, 1].map(end => {
    const input = make("input", { type: "number", step: "any",
      "aria-label": `${title}, ${end ? "highest" : "lowest"}`,
      value: range ? range[end] : "", placeholder: short(end ? high : low) });
    input.addEventListener("change", () => {
      const [first, last] = inputs.map((one, at) => one.value === "" ? [low, high][at] : Number(one.value));
      input.blur();
      inputs.every(one => one.value === "") ? setRange(name, null) : setRange(name, first, last);
    });
    return input;
  });
  const head = make("h3", {}, make("span", {}, title));
  if (range) {
    const clear = make("button", { "aria-label": `Clear ${title}` }, "×");
    clear.addEventListener("click", () => setRange(name, null));
    head.append(clear);
  }
  const box = make("div", { class: "histogram", "data-column": name }, head, chart,
    make("div", { class: "ends" }, ...inputs));
  if (missing) box.append(make("div", { class: "note" }, `${count(missing)} without a value`));
  return box;
}

function setRange(name, low, high) {
  if (low === null || !(low <= high)) delete query.ranges[name];
  else query.ranges[name] = [low, high];
  changed();
}

function wordList(name, { title, counts }) {
  const shown = counts.filter(([word, number]) => number || query.labels[name] === word);
  if (!shown.length || (shown.length === 1 && !query.labels[name])) return null;
  const buttons = shown.slice(0, 12).map(([word, number]) => {
    const chosen = query.labels[name] === word;
    const button = make("button", { "aria-pressed": String(chosen) }, `${word} (${count(number)})`);
    button.addEventListener("click", () => {
      if (chosen) delete query.labels[name];
      else query.labels[name] = word;
      changed();
    });
    return button;
  });
  return make("div", { class: "words", "data-column": name }, make("h3", {}, title), ...buttons);
}
