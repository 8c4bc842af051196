"use strict";
// One clip: frames with masks, principal components, and the Gram flow of the token pointed at.

const WIDTH = 640;  // of a panel's canvas, in its own pixels
const view = { row: null, clip: null, sheets: {}, frame: 0, playing: false, token: null,
  temperature: 0.1, direction: null, windows: {}, motions: {}, panels: [], student: null,
  studentKnown: false };
let windowBusy = false, windowWanted = false, motionTimer = null, clipAsked = 0;

async function showClip(row) {
  const mine = ++clipAsked;
  stop();
  element("key").textContent = "…";
  for (const id of ["caption", "facts"]) element(id).textContent = "";
  for (const id of ["notes", "panels", "stores"]) element(id).replaceChildren();
  const clip = await attempt(() => source.clip(row));
  if (!clip || mine !== clipAsked) return;
  const sheets = {};
  await Promise.all(Object.keys(clip.layers).map(async name => {
    const picture = new Image();
    picture.src = source.sheet(row, name);
    await picture.decode().then(() => { sheets[name] = picture; }).catch(() => {
      clip.notes.push(`${name} cannot be shown`);
    });
  }));
  if (mine !== clipAsked) return;
  Object.assign(view, { row, clip, sheets, frame: 0, token: null, windows: {}, motions: {},
    studentKnown: false });
  element("key").textContent = clip.key;
  element("caption").textContent = clip.caption || "";
  element("facts").textContent = clip.facts.join(", ") || summary(clip);
  element("notes").replaceChildren(...clip.notes.map(note => make("li", {}, note)));
  element("frame").max = clip.num_frames - 1;
  for (const direction of ["forward", "backward"])
    element(direction).parentElement.hidden = !sheets[`mask_${direction}`];
  const directions = clip.flow ? clip.flow.directions : [];
  if (!directions.includes(view.direction)) view.direction = directions[0] || null;
  element("direction").replaceChildren(...directions.map(name => make("option", { value: name },
    name === "forward" ? "to the next frame" : "to the previous frame")));
  element("direction").value = view.direction || "";
  element("flow-controls").hidden = !clip.flow;
  element("stores").replaceChildren(...clip.stores.map(storeFacts));
  markLeftOut(clip.left_out);
  makePanels();
  showTemperature();
  if (clip.flow) view.token = [1, 2].map(axis =>
    Math.min(Math.floor(clip.subject[axis - 1] * clip.flow.shape[axis]), clip.flow.shape[axis] - 1));
  showFrame(0);
  askMotion();
  askStudent();
}

// The sides that are shown: the teacher, and the student once it has been computed.
const sides = () => ["teacher", ...(view.studentKnown ? ["student"] : [])];
const nameOf = side => side === "teacher" ? side : element("timestep").value;

async function askStudent() {
  element("student-facts").textContent = "";
  element("student").hidden = !view.student || !view.clip.flow;
  if (element("student").hidden) return;
  const { row } = view, timestep = element("timestep").value;
  view.studentKnown = false;
  element("student-facts").textContent = "student: computing …";
  const found = await attempt(() => source.student(row, timestep));
  if (row !== view.row || timestep !== element("timestep").value) return;
  view.studentKnown = Boolean(found);
  element("student-facts").textContent = !found ? "no student" :
    `after ${found.step} steps${found.weights === "average" ? " (EMA)" : ""}, Local Gram Flow loss ${found.loss === null ? "not finite" : found.loss.toFixed(4)}`;
  askWindow();
  askMotion();
}

function storeFacts(store) {
  if (store.problem) return make("p", { class: "problem" }, `${store.kind}: ${store.problem}`);
  const rows = [["store", store.name], ["shard", `${store.shard} (from ${store.source})`],
    ["fingerprint", store.fingerprint],
    ...store.arrays.map(([name, dtype, shape, size]) =>
      [name, `${dtype} [${shape.join(", ")}], ${count(size)} bytes`])];
  const table = make("table", {}, ...rows.map(([name, value]) =>
    make("tr", {}, make("td", {}, name), make("td", {}, value))));
  const json = value => make("pre", {}, JSON.stringify(value, null, 1));
  return make("details", {}, make("summary", {}, store.kind), table,
    make("p", { class: "note" }, "record of the clip"), json(store.attributes),
    make("p", { class: "note" }, "settings of the store"), json(store.settings),
    make("p", { class: "note" }, "made with"), json(store.made_with));
}

function makePanels() {
  const { clip, sheets } = view, panels = [];
  const ground = ["frames", "components_fused", "components_latents", "mask_forward"]
    .find(name => sheets[name]);
  const add = (kind, title, layer) => {
    const size = layer ? clip.layers[layer] : { width: clip.flow.shape[2], height: clip.flow.shape[1] };
    const canvas = make("canvas", { width: WIDTH, height: Math.round(WIDTH * size.height / size.width),
      role: "img", "aria-label": title });
    const caption = make("figcaption", {}, title);
    panels.push({ kind, layer, canvas, caption, title, figure: make("figure", {}, caption, canvas) });
    return canvas;
  };
  if (ground) add("frame", ground === "frames" ? "frame" : clip.layers[ground].title, ground);
  if (clip.flow) {
    if (ground) add("window", "", ground);
    for (const side of view.student ? ["teacher", "student"] : ["teacher"]) {
      add("zoom", `${side}: window of the token, probabilities in percent`, null).dataset.side = side;
      add("motion", `${side}: implied flow, as arrows and colours`, null).dataset.side = side;
    }
  }
  for (const name of Object.keys(clip.layers).filter(name => name.startsWith("components_")))
    if (name !== ground && sheets[name]) add("components", clip.layers[name].title, name);
  for (const panel of panels.filter(panel => panel.kind !== "zoom")) {
    panel.canvas.addEventListener("pointermove", event => pointAt(panel, event));
    panel.canvas.addEventListener("pointerdown", event => pointAt(panel, event));
  }
  view.panels = panels;
  element("panels").replaceChildren(...panels.map(panel => panel.figure));
}

function pointAt(panel, event) {
  if (!view.clip.flow) return;
  const box = panel.canvas.getBoundingClientRect(), [, height, width] = view.clip.flow.shape;
  const inside = (at, count) => Math.min(Math.max(Math.floor(at * count), 0), count - 1);
  setToken(inside((event.clientY - box.top) / box.height, height),
    inside((event.clientX - box.left) / box.width, width));
}

function setToken(y, x) {
  const [, height, width] = view.clip.flow.shape;
  const token = [Math.min(Math.max(y, 0), height - 1), Math.min(Math.max(x, 0), width - 1)];
  if (view.token && token[0] === view.token[0] && token[1] === view.token[1]) return;
  view.token = token;
  askWindow();
}

// A latent frame stands for the frames up to its own.
const momentOf = (moments, frame) => {
  const found = moments.findIndex(at => at >= frame);
  return found < 0 ? moments.length - 1 : found;
};

// The pair whose query map is the shown one, and the map that its window is in.
function pairNow() {
  const moment = momentOf(view.clip.flow.moments, view.frame);
  const backward = view.direction === "backward", pair = backward ? moment - 1 : moment;
  if (pair < 0 || pair >= view.clip.flow.shape[0]) return null;
  return { pair, other: backward ? pair : pair + 1 };
}

async function askWindow() {
  windowWanted = true;
  if (windowBusy) return;
  windowBusy = true;
  while (windowWanted) {
    windowWanted = false;
    const { row, direction, temperature, token } = view, now = view.clip.flow && pairNow();
    const found = {};
    for (const side of now && token ? sides() : [])
      found[side] = await attempt(() =>
        source.window(row, nameOf(side), direction, now.pair, ...token, temperature));
    if (row === view.row && !windowWanted) { view.windows = found; draw(); }
  }
  windowBusy = false;
}

function askMotion() {
  clearTimeout(motionTimer);
  if (!view.clip.flow) return;
  motionTimer = setTimeout(async () => {
    const { row, direction, temperature } = view;
    for (const side of sides()) {
      const found = await attempt(() => source.motion(row, nameOf(side), direction, temperature));
      if (found && row === view.row) { view.motions[side] = found; draw(); }
    }
  }, 60);
}

function showTemperature() {
  element("temperature").value = Math.log10(view.temperature);
  element("temperature-value").textContent = (source.live ? "" : "temperature ") +
    view.temperature.toPrecision(2);
}

function showFrame(frame) {
  const { clip } = view;
  view.frame = (frame + clip.num_frames) % clip.num_frames;
  element("frame").value = view.frame;
  const unused = clip.valid && !clip.valid[view.frame];
  element("moment").textContent = `frame ${view.frame}${unused ? ", not valid" : ""}`;
  if (clip.flow) askWindow();
  else draw();
}

function drawPicture(context, layer, moment) {
  const { columns, width, height } = view.clip.layers[layer], canvas = context.canvas;
  context.imageSmoothingEnabled = layer === "frames";
  context.drawImage(view.sheets[layer], moment % columns * width, Math.floor(moment / columns) * height,
    width, height, 0, 0, canvas.width, canvas.height);
}

function drawMask(context, direction, frame) {
  const layer = `mask_${direction}`;
  if (!view.sheets[layer] || !element(direction).checked) return;
  const { columns, width, height, moments } = view.clip.layers[layer], moment = momentOf(moments, frame);
  const { width: w, height: h } = context.canvas;
  const scratch = new OffscreenCanvas(w, h), inner = scratch.getContext("2d", { willReadFrequently: true });
  inner.drawImage(view.sheets[layer], moment % columns * width, Math.floor(moment / columns) * height,
    width, height, 0, 0, w, h);
  const pixels = inner.getImageData(0, 0, w, h), data = pixels.data;
  const colour = view.colours[direction].match(/[0-9a-f]{2}/gi).map(part => parseInt(part, 16));
  const on = new Uint8Array(w * h);
  // A stored mask is 255 times a probability: at least one half is 128.
  for (let at = 0; at < on.length; at++) on[at] = data[4 * at] >= 128 ? 1 : 0;
  for (let y = 0, at = 0; y < h; y++) {
    for (let x = 0; x < w; x++, at++) {
      const edge = on[at] && (x > 1 && !on[at - 2] || x < w - 2 && !on[at + 2] ||
        y > 1 && !on[at - 2 * w] || y < h - 2 && !on[at + 2 * w]);
      // The backward outline is dashed, so that both are seen where they coincide.
      const line = edge && (direction === "forward" || (x + y >> 3) % 2);
      const opacity = line ? 255 : edge ? 0 : 64;
      data[4 * at] = colour[0];
      data[4 * at + 1] = colour[1];
      data[4 * at + 2] = colour[2];
      data[4 * at + 3] = on[at] ? opacity : 0;
    }
  }
  inner.putImageData(pixels, 0, 0);
  context.drawImage(scratch, 0, 0);
}

function tokenBox(context, y, x) {
  const [, height, width] = view.clip.flow.shape;
  const w = context.canvas.width / width, h = context.canvas.height / height;
  return [x * w, y * h, w, h];
}

function drawToken(context) {
  if (!view.clip.flow || !view.token) return;
  for (const [colour, size] of [["#000", 5], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = size;
    context.strokeRect(...tokenBox(context, ...view.token));
  }
}

function drawWindow(context) {
  if (!view.windows.teacher || !view.token) return;
  const { radius, probability } = view.windows.teacher, side = 2 * radius + 1;
  const most = Math.max(...probability);
  probability.forEach((value, k) => {
    if (value === null) return;
    const box = tokenBox(context, view.token[0] + Math.floor(k / side) - radius,
      view.token[1] + k % side - radius);
    context.fillStyle = `rgba(255, 196, 0, ${0.8 * value / (most || 1)})`;
    context.fillRect(...box);
    context.strokeStyle = "rgba(255, 255, 255, 0.45)";
    context.lineWidth = 1;
    context.strokeRect(...box);
  });
}

function drawZoom(context, window) {
  const { canvas } = context;
  context.fillStyle = "#101418";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (!window) return;
  const { radius, probability } = window, side = 2 * radius + 1;
  const wide = canvas.width / side, tall = canvas.height / side, most = Math.max(...probability);
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.font = `${Math.min(26, tall / 2.2)}px system-ui, sans-serif`;
  probability.forEach((value, k) => {
    const x = k % side * wide, y = Math.floor(k / side) * tall;
    if (value === null) return;
    const share = value / (most || 1);
    context.fillStyle = `hsl(43 100% ${6 + 46 * share}%)`;
    context.fillRect(x + 1, y + 1, wide - 2, tall - 2);
    context.fillStyle = share > 0.6 ? "#000" : "#fff";
    context.fillText((100 * value).toFixed(value < 0.0995 ? 1 : 0), x + wide / 2, y + tall / 2);
  });
  context.strokeStyle = "#fff";
  context.lineWidth = 3;
  context.strokeRect(radius * wide + 1, radius * tall + 1, wide - 2, tall - 2);
}

function drawMotion(context, pair, flow) {
  const { canvas } = context, [, height, width] = view.clip.flow.shape;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (!flow || !pair) return;
  const start = pair.pair * height * width * 2, w = canvas.width / width;
  const longest = Math.max(0.2, view.longest ?? 0);
  const stride = Math.max(1, Math.ceil(18 / w));
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const at = start + 2 * (y * width + x), dx = flow[at], dy = flow[at + 1];
    const share = Math.min(Math.hypot(dx, dy) / longest, 1);
    // Hue is the direction, saturation the length, as on the pictures of `inspect`.
    const hue = (Math.atan2(dy, dx) * 180 / Math.PI + 360) % 360;
    context.fillStyle = `hsl(${hue} 100% ${100 - 50 * share}%)`;
    context.fillRect(...tokenBox(context, y, x));
  }
  context.strokeStyle = "#000";
  context.lineWidth = 1.5;
  for (let y = stride >> 1; y < height; y += stride) for (let x = stride >> 1; x < width; x += stride) {
    const at = start + 2 * (y * width + x), [left, top, cell, tall] = tokenBox(context, y, x);
    const scale = stride * w / Math.max(longest, Math.hypot(flow[at], flow[at + 1]));
    const to = [left + cell / 2 + flow[at] * scale * 0.9, top + tall / 2 + flow[at + 1] * scale * 0.9];
    context.beginPath();
    context.moveTo(left + cell / 2, top + tall / 2);
    context.lineTo(...to);
    context.stroke();
    context.fillStyle = "#000";
    context.fillRect(to[0] - 2, to[1] - 2, 4, 4);
  }
}

function draw() {
  const { clip, frame } = view, pair = clip.flow ? pairNow() : null;
  const motion = view.motions.teacher;
  if (motion && view.measured !== motion) {
    view.measured = motion;  // the student's flow is drawn on the teacher's scale
    const lengths = [];
    for (let at = 0; at < motion.length; at += 2)
      lengths.push(Math.hypot(motion[at], motion[at + 1]));
    lengths.sort((a, b) => a - b);
    view.longest = lengths[Math.floor(0.99 * (lengths.length - 1))];
  }
  for (const panel of view.panels) {
    const context = panel.canvas.getContext("2d"), moments = panel.layer && clip.layers[panel.layer].moments;
    if (panel.kind === "frame" || panel.kind === "components") {
      drawPicture(context, panel.layer, momentOf(moments, frame));
      if (panel.kind === "frame") for (const name of ["forward", "backward"]) drawMask(context, name, frame);
      drawToken(context);
    } else if (panel.kind === "window") {
      const other = pair ? clip.flow.moments[pair.other] : frame;
      panel.caption.textContent = pair ? `frame ${other}, with the token's window`
        : `no ${view.direction === "backward" ? "previous" : "next"} frame`;
      drawPicture(context, panel.layer, momentOf(moments, other));
      if (pair) drawWindow(context);
    } else if (panel.kind === "zoom") drawZoom(context, view.windows[panel.canvas.dataset.side]);
    else drawMotion(context, pair, view.motions[panel.canvas.dataset.side]);
  }
  const { token } = view, window = view.windows.teacher;
  element("window-facts").textContent = !window ? "" : [
    `token row ${token[0]}, column ${token[1]}`,
    window.offset ? `expected offset (${window.offset.map(value => value.toFixed(2)).join(", ")}) tokens` : "",
    window.entropy === undefined ? "" : `entropy ${window.entropy.toFixed(2)} of a uniform choice`,
    window.valid ? "" : "training leaves this pair out",
  ].filter(Boolean).join("; ");
}

let timer = null;

function stop() {
  clearInterval(timer);
  view.playing = false;
  element("play").textContent = "Play";
  element("play").setAttribute("aria-pressed", "false");
}

function togglePlay() {
  if (view.playing) return stop();
  view.playing = true;
  element("play").textContent = "Pause";
  element("play").setAttribute("aria-pressed", "true");
  timer = setInterval(() => showFrame(view.frame + 1), 1000 / view.clip.fps);
}

function markLeftOut(leave) {
  const button = element("leave");
  button.setAttribute("aria-pressed", String(leave));
  button.textContent = leave ? "On the list to leave out: take off" : "Leave this clip out";
  element("leave-commands").hidden = !leave || !source.live;
}

async function toggleLeftOut() {
  const leave = !view.clip.left_out;
  const state = await attempt(() => source.leaveOut(view.row, leave));
  if (!state) return;
  view.clip.left_out = leave;
  showCommands(state);
  markLeftOut(leave);
}

function showCommands(state) {
  document.querySelectorAll("#leave-commands pre").forEach((place, at) => {
    place.textContent = state.leave_out_commands[at];
  });
}
