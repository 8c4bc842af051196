"use strict";
// Where data come from: the server that serves this page, or, in a saved page, the page itself.

const embedded = document.getElementById("data");
const source = embedded ? savedSource(JSON.parse(embedded.textContent)) : serverSource();

function serverSource() {
  async function ask(path, options) {
    const answer = await fetch(path, options);
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      throw new Error(said.error || `the server answered ${answer.status}`);
    }
    return answer;
  }
  const json = async path => (await ask(path)).json();
  return {
    live: true,
    state: () => json("api/state"),
    clips: parameters => json(`api/clips?${parameters}`),
    histograms: parameters => json(`api/histograms?${parameters}`),
    clip: row => json(`api/clip/${row}`),
    still: row => `api/still/${row}`,
    loop: row => `api/loop/${row}`,
    sheet: (row, name) => `api/layer/${row}/${name}`,
    student: (row, timestep) => json(`api/student/${row}/${timestep}`),
    // A side is the teacher, or a timestep of the student.
    window: (row, side, direction, pair, y, x, temperature) =>
      json(`api/window/${row}/${side}/${direction}/${pair}/${y}/${x}?temperature=${temperature}`),
    motion: async (row, side, direction, temperature) => new Float32Array(await (await ask(
      `api/motion/${row}/${side}/${direction}?temperature=${temperature}`)).arrayBuffer()),
    leaveOut: async (row, leave) => (await ask(`api/leave_out/${row}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ leave_out: leave }),
    })).json(),
  };
}

function savedSource(saved) {
  const bytes = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));
  const decoded = new Map();
  function array(row, name, make) {
    const key = `${row} ${name}`;
    if (!decoded.has(key)) decoded.set(key, make(bytes(saved.clips[row].arrays[name])));
    return decoded.get(key);
  }
  return {
    live: false,
    state: async () => saved.state,
    clips: async () => ({ matching: saved.clips.length, offset: 0, read: saved.clips.length,
      finished: true, clips: saved.clips.map(clip => clip.facts) }),
    histograms: async () => ({ numbers: {}, labels: {} }),
    clip: async row => saved.clips[row].facts,
    still: row => saved.clips[row].still,
    loop: row => saved.clips[row].loop,
    sheet: (row, name) => saved.clips[row].sheets[name],
    window: async (row, side, direction, pair, y, x) => {
      // Probabilities are stored in steps of 1/255, those outside the grid as 0.
      const [, height, width, count] = saved.clips[row].facts.flow.shape;
      const all = array(row, `probability_${direction}`, found => found);
      const start = ((pair * height + y) * width + x) * count;
      const across = Math.sqrt(count), radius = (across - 1) / 2;
      const inside = k => {
        const there = y + Math.floor(k / across) - radius, column = x + k % across - radius;
        return there >= 0 && there < height && column >= 0 && column < width;
      };
      const valid = saved.clips[row].facts.flow.valid;
      return {
        radius,
        probability: Array.from({ length: count }, (_, k) => inside(k) ? all[start + k] / 255 : null),
        valid: valid[pair] && valid[pair + 1],
      };
    },
    motion: async (row, side, direction) => array(row, `motion_${direction}`,
      found => new Float32Array(found.buffer)),
  };
}
