// The explorer's drawing: one component for the live notebook (anywidget) and for offline pages.
// Plain script, no imports, no network. Python appends one line: an export for anywidget, or a call of mountExplorer.

const SITES = ["q_proj", "query", "o_proj", "gate_proj", "down_proj"];
const ITSELF = 0, ZERO = 255;
const VIRIDIS = ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
const OKABE_ITO = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"];
const MUTED = ["#88CCEE", "#CC6677", "#DDCC77", "#117733", "#332288", "#AA4499", "#44AA99", "#999933", "#882255"];
const SIMILAR = "#0072B2", COMPUTED = "#E69F00", EMPTY = "#8a8a8a";
const PLACES = [
  "← left", "↑ above", "↖ above left", "frame before, same place", "frame before, left", "frame before, above",
  "frame before, above left",
];
const TYPES = { uint8: Uint8Array, uint16: Uint16Array, int16: Int16Array, int32: Int32Array, float32: Float32Array };

// ---- data ---------------------------------------------------------------------------------------------------------

/** The packed form of view_data.ViewData (deflated bytes) → header with typed arrays and decoded pictures. */
async function readView(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const view = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const array = ({ dtype, shape, at }) => new TYPES[dtype](buffer, 4 + length + at, shape.reduce((a, b) => a * b, 1));
  for (const name of ["dropped", "frame", "panel", "box", "importance", "neighbours"]) if (view[name]) view[name] = array(view[name]);
  for (const site of SITES)
    for (const name of ["codes", "similar", "zero", "follows", "mean", "steps", "above"])
      if (view.sites[site][name]) view.sites[site][name] = array(view.sites[site][name]);
  for (const ranking of view.rankings ?? []) for (const name of ["scores", "place"]) ranking[name] = array(ranking[name]);
  if (view.links) for (const name of ["target", "kind"]) view.links[name] = array(view.links[name]);
  view.images = await Promise.all(view.pictures.files.map((file) => {
    const data = array(file);
    return createImageBitmap(new Blob([data], { type: data[0] === 0x89 ? "image/png" : "image/jpeg" }));
  }));
  view.ofFrame = Array.from({ length: view.pictures.count }, () => []);
  view.frame.forEach((frame, token) => view.ofFrame[frame].push(token));
  view.extents = view.panels.map(() => [1, 1]);
  for (let p = 0; p < view.tokens; p++) {
    const extent = view.extents[view.panel[p]];
    extent[0] = Math.max(extent[0], view.box[4 * p] + view.box[4 * p + 2]);
    extent[1] = Math.max(extent[1], view.box[4 * p + 1] + view.box[4 * p + 3]);
  }
  return view;
}

/** Numbers of a view at a state; everything drawn is read through these. */
class Reader {
  constructor(view) {
    this.view = view;
    this.roots = new Map();
    for (const site of SITES) {
      const s = view.sites[site], n = view.tokens;
      s.zeros = Array.from({ length: view.layers }, (_, l) => sum(s.zero, l * n, (l + 1) * n));
      s.similars = Array.from({ length: view.layers }, (_, l) => sum(s.similar, l * n, (l + 1) * n));
      if (s.mean) s.means = s.zeros.map((_, l) => this.meanOf(s, l));
    }
  }
  meanOf(s, layer) {
    const n = this.view.tokens;
    let total = 0, count = 0;
    for (let p = layer * n; p < (layer + 1) * n; p++) if (s.zero[p] < s.vectors) { total += s.mean[p]; count++; }
    return count ? total / count / 255 : 0;
  }
  /** Index of the largest threshold step that is at most `value`. */
  step(value) {
    const steps = this.view.thresholds;
    let low = 0, high = steps.length - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (steps[mid] <= value + 1e-9) low = mid; else high = mid - 1; }
    return low;
  }
  /** Vectors of a site that are similar at a threshold (the run's own: as the run counted them). */
  similar(site, layer, threshold) {
    const s = this.view.sites[site];
    if (!s.above || threshold === this.view.threshold) return s.similars[layer];
    return s.above[layer * this.view.thresholds.length + this.step(threshold)];
  }
  /** Shares of a site's S·V vectors. */
  shares(site, layer, threshold) {
    const s = this.view.sites[site], all = this.view.tokens * s.vectors;
    const similar = this.similar(site, layer, threshold) / all, zero = s.zeros[layer] / all;
    return { similar, zero, sparsity: (this.similar(site, layer, threshold) + s.zeros[layer]) / all };
  }
  /** Whether a token is still in the sequence at a site of a layer. */
  present(p, site, layer) {
    const dropped = this.view.dropped[p];
    return dropped < 0 || 2 * layer + (site === "gate_proj" || site === "down_proj") < dropped;
  }
  /** Share of a token's vectors that are similar at a threshold: exact at the run's, else over the shown vectors. */
  tokenSimilar(p, site, layer, threshold) {
    const s = this.view.sites[site], at = layer * this.view.tokens + p, shown = s.shown.length;
    if (!s.steps || threshold === this.view.threshold) return s.similar[at] / s.vectors;
    const step = this.step(threshold);
    let count = 0;
    for (let j = at * shown; j < (at + 1) * shown; j++) count += s.steps[j] > step;
    return count / shown;
  }
  /** Best similarity of a token: of one shown vector, or the mean of all. 0 … 1 */
  similarity(p, site, layer, vector) {
    const s = this.view.sites[site], at = layer * this.view.tokens + p;
    if (vector < 0) return s.mean[at] / 255;
    const steps = s.steps[at * s.shown.length + vector];
    return steps ? this.view.thresholds[Math.min(steps, this.view.thresholds.length) - 1] : 0;
  }
  /** Code of a token: of one shown vector, or the candidate that most of its vectors follow. */
  code(p, site, layer, vector) {
    const s = this.view.sites[site], at = layer * this.view.tokens + p;
    return vector < 0 ? s.follows[at] : s.codes[at * s.shown.length + vector];
  }
  /** Where each token's pointer ends, for one shown vector, and how many end there. */
  groups(site, layer, vector) {
    const key = `${site} ${layer} ${vector}`;
    if (!this.roots.has(key)) {
      const { tokens, hops } = this.view;
      const root = new Int32Array(tokens), size = new Int32Array(tokens);
      for (let p = 0; p < tokens; p++) {
        let at = p;
        for (let hop = 0; hop < hops; hop++) {
          const code = this.code(at, site, layer, vector);
          if (code === ITSELF || code === ZERO) break;
          at = follow(this.view, at, code);
        }
        root[p] = at;
        size[at]++;
      }
      if (this.roots.size > 64) this.roots.clear();
      this.roots.set(key, { root, size });
    }
    return this.roots.get(key);
  }
  /** Share of the vectors in which each token is in one group with token p: [S] 0 … 1. */
  companions(p, site, layer, vector) {
    const share = new Float32Array(this.view.tokens);
    const vectors = vector < 0 ? this.view.sites[site].shown.map((_, j) => j) : [vector];
    for (const j of vectors) {
      const { root, size } = this.groups(site, layer, j);
      if (size[root[p]] > 1) for (let q = 0; q < share.length; q++) if (root[q] === root[p]) share[q] += 1 / vectors.length;
    }
    return share;
  }
  /** The ranking that is shown: the last one up to this layer and site, else the first; until: the next one's stage. */
  ranking({ layer, site }) {
    const { rankings } = this.view, stage = 2 * layer + (site === "gate_proj" || site === "down_proj");
    const index = Math.max(0, rankings.findLastIndex((ranking) => ranking.stage <= stage)), found = rankings[index];
    if (found.least === undefined) {
      const ranked = found.scores.filter((score) => score > -Infinity), finite = ranked.filter((score) => score < Infinity);
      const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
      found.least = finite.length ? low.toPrecision(2) : "";
      found.most = ranked.length > finite.length ? "always kept" : high.toPrecision(2);
      found.count = ranked.length;
      found.until = rankings[index + 1]?.stage ?? Infinity;
    }
    return found;
  }
  /** Tokens that are merged with token p, for methods with links between whole tokens: [S] 0 or 1. */
  linked(p) {
    const { target } = this.view.links, share = new Float32Array(this.view.tokens);
    const end = (q) => { for (let hop = 0; target[q] !== q && hop < target.length; hop++) q = target[q]; return q; };
    const root = end(p);
    for (let q = 0; q < share.length; q++) share[q] = end(q) === root;
    return share;
  }
}

/** The token that a code leads to: by a distance, or (unequal frames, tiles, several media) by a table. */
const follow = (view, p, code) => (view.neighbours ? view.neighbours[(code - 1) * view.tokens + p] : p - view.candidates[code - 1][0]);
const sum = (array, from, to) => { let total = 0; for (let i = from; i < to; i++) total += array[i]; return total; };
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- colours ------------------------------------------------------------------------------------------------------

const HEAT = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (VIRIDIS.length - 1), k = Math.min(VIRIDIS.length - 2, Math.floor(place)), t = place - k;
  const part = (hex, c) => parseInt(hex.slice(1 + 2 * c, 3 + 2 * c), 16);
  return `rgb(${[0, 1, 2].map((c) => Math.round((1 - t) * part(VIRIDIS[k], c) + t * part(VIRIDIS[k + 1], c))).join()})`;
});
const heat = (share) => HEAT[clamp(Math.round(255 * share), 0, 255)];

/** What can be laid over the frame: label, when it exists, the colour of a token (null: none), and its legend. */
const OVERLAYS = {
  similarity: {
    label: "best similarity to neighbours", exists: (v) => !!v.sites.query.mean,
    colour: (r, s, p) => heat((r.similarity(p, s.site, s.layer, s.vector) - r.view.floor) / (1 - r.view.floor)),
    legend: (r) => ({ low: r.view.floor.toFixed(2), high: "1.00", unit: "cosine similarity, best candidate, mean over vectors" }),
  },
  kinds: {
    label: "similar / zero / computed", exists: () => true, bars: true,
    legend: () => ({ items: [["similar", SIMILAR], ["zero", EMPTY], ["computed", COMPUTED]], unit: "share of the token's vectors" }),
  },
  similar: {
    label: "share similar at the threshold", exists: () => true,
    colour: (r, s, p) => heat(r.tokenSimilar(p, s.site, s.layer, s.threshold)),
    legend: () => ({ low: "0 %", high: "100 %", unit: "of the token's vectors above the threshold" }),
  },
  follows: {
    label: "neighbour followed", exists: () => true,
    colour: (r, s, p) => {
      const code = r.code(p, s.site, s.layer, s.vector);
      return code === ITSELF || code === ZERO ? null : OKABE_ITO[placeOf(r.view.candidates[code - 1])];
    },
    legend: (r) => ({
      items: [...new Set(r.view.candidates.map(placeOf))].map((k) => [PLACES[k], OKABE_ITO[k]]),
      unit: "by most of the token's similar vectors; clear: none",
    }),
  },
  group: {
    label: "groups that share a mean", exists: () => true,
    colour: (r, s, p) => {
      const { root, size } = r.groups(s.site, s.layer, Math.max(0, s.vector));
      return size[root[p]] > 1 ? MUTED[(root[p] * 7) % MUTED.length] : null;
    },
    legend: (r, s) => ({ unit: `vector ${r.view.sites[s.site].shown[Math.max(0, s.vector)]}: one colour a group; clear: alone. Point at a token to see its group.` }),
  },
  importance: {
    label: "prompt importance", exists: (v) => !!v.importance,
    colour: (r, s, p) => heat(Math.sqrt(r.view.importance[s.layer * r.view.tokens + p] / 65535)),
    legend: (r, s) => ({ low: "0", high: r.view.importance_most[s.layer].toPrecision(2), unit: "highest attention of a text token to it (square-root scale)" }),
  },
  ranking: {
    label: "what the method ranks by", exists: (v) => !!v.rankings?.length, all: true,
    colour: (r, s, p) => heat(r.ranking(s).place[p] / 65535),
    absent: (r, s, p) => r.ranking(s).place[p] === 0,
    crossed: (r, s, p) => r.view.dropped[p] >= 0 && r.view.dropped[p] < r.ranking(s).until,
    legend: (r, s) => {
      const { by, stage, least, most } = r.ranking(s);
      return { low: least, high: most, unit: `${by}, ${stage & 1 ? "in" : "before"} layer ${stage >> 1}; colours by rank; crossed: then dropped` };
    },
  },
  dropped: {
    label: "dropped at layer", exists: () => true, all: true,
    colour: (r, s, p) => (r.view.dropped[p] < 0 ? null : heat((r.view.dropped[p] >> 1) / Math.max(1, r.view.layers - 1))),
    legend: (r) => ({ low: "0", high: `${r.view.layers - 1}`, unit: "layer that drops the token; clear: kept to the end" }),
  },
  links: {
    label: "links", exists: (v) => !!v.links, all: true,
    colour: (r, s, p) => (r.view.links.kind[p] ? OKABE_ITO[(r.view.links.kind[p] + 3) % OKABE_ITO.length] : null),
    legend: (r) => ({
      items: r.view.links.kinds.map((kind, k) => [kind, k ? OKABE_ITO[(k + 3) % OKABE_ITO.length] : "transparent"]), unit: r.view.links.title,
    }),
  },
  none: { label: "picture only", exists: () => true, colour: () => null, legend: () => ({ unit: "" }) },
};
const placeOf = ([, frames, rows, columns]) => 4 * (frames > 0) + 2 * (rows > 0) + (columns > 0) - 1;

// ---- drawing ------------------------------------------------------------------------------------------------------

/** Size a canvas in CSS pixels, sharp on dense screens; returns its cleared context. */
function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1, w = Math.round(width * ratio), h = Math.round(height * ratio);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  if (canvas.style) { canvas.style.width = `${width}px`; canvas.style.height = `${height}px`; }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, width, height);
  c.lineJoin = "round";
  return c;
}

/** Lay a token's cell over the picture. box: x, y, width, height in pixels. */
function paintToken(c, reader, state, p, [x, y, w, h], theme, plain) {
  const overlay = OVERLAYS[state.overlay];
  if (overlay.absent ? overlay.absent(reader, state, p) : !overlay.all && !reader.present(p, state.site, state.layer)) {
    if (state.overlay === "none") return;
    c.globalAlpha = 0.72;
    c.fillStyle = theme.dim;
    c.fillRect(x, y, w, h);
    if (plain) return;
    c.globalAlpha = 0.35;
    c.strokeStyle = theme.text;
    c.beginPath(); c.moveTo(x, y + h); c.lineTo(x + w, y); c.stroke();
    return;
  }
  c.globalAlpha = state.opacity;
  if (overlay.bars) {
    const s = reader.view.sites[state.site], zero = s.zero[state.layer * reader.view.tokens + p] / s.vectors;
    const similar = reader.tokenSimilar(p, state.site, state.layer, state.threshold);
    let left = x;
    for (const [share, colour] of [[similar, SIMILAR], [zero, EMPTY], [1 - similar - zero, COMPUTED]]) {
      if (share <= 0) continue;
      c.fillStyle = colour;
      c.fillRect(left, y, w * share, h);
      left += w * share;
    }
    return;
  }
  const colour = overlay.colour(reader, state, p);
  if (colour === null) return;
  const crossed = overlay.crossed?.(reader, state, p);
  if (crossed && plain) c.globalAlpha *= 0.35;
  c.fillStyle = colour;
  c.fillRect(x, y, w, h);
  if (!crossed || plain) return;
  c.globalAlpha = 0.8;
  c.strokeStyle = theme.back; c.lineWidth = 1.5;
  c.beginPath(); c.moveTo(x, y); c.lineTo(x + w, y + h); c.moveTo(x, y + h); c.lineTo(x + w, y); c.stroke();
}

/** Stands in for a context where thousands of cells are painted: writes pixels itself, many times faster. */
class PixelPainter {
  constructor(width, height) {
    this.ratio = window.devicePixelRatio || 1;
    this.sheet = new ImageData(Math.round(width * this.ratio), Math.round(height * this.ratio));
    this.pixels = new Uint32Array(this.sheet.data.buffer);
    this.known = new Map();
    this.globalAlpha = 1;
  }
  set fillStyle(colour) {
    if (!this.known.has(colour)) {
      const hex = colour.startsWith("#") ? [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)) : colour.match(/\d+/g).map(Number);
      this.known.set(colour, hex[0] | (hex[1] << 8) | (hex[2] << 16));
    }
    this.colour = this.known.get(colour);
  }
  fillRect(x, y, w, h) {
    const at = (value, most) => clamp(Math.round(value * this.ratio), 0, most), value = (Math.round(255 * this.globalAlpha) << 24) | this.colour;
    const left = at(x, this.sheet.width), right = at(x + w, this.sheet.width), bottom = at(y + h, this.sheet.height);
    for (let row = at(y, this.sheet.height); row < bottom; row++) this.pixels.fill(value, row * this.sheet.width + left, row * this.sheet.width + right);
  }
}

function paintPicture(c, view, frame, x, y, w, h, theme) {
  if (view.images[frame]) { c.imageSmoothingEnabled = view.pictures.width > 128; c.drawImage(view.images[frame], x, y, w, h); return; }
  c.fillStyle = theme.soft;
  c.fillRect(x, y, w, h);
}

/** Pixel boxes of the panels of a frame, side by side or below each other, whichever is larger in width × height. */
function placePanels(view, width, height) {
  const aspect = view.pictures.width / view.pictures.height, count = view.panels.length, gap = 14, title = count > 1 ? 16 : 0;
  const wide = Math.max(...view.extents.map(([x]) => x * aspect)), tall = Math.max(...view.extents.map(([, y]) => y));
  const fit = (columns, rows) => Math.min((width - gap * (columns - 1)) / (wide * columns), (height - title * rows) / (tall * rows));
  const beside = fit(count, 1) >= fit(1, count), unit = beside ? fit(count, 1) : fit(1, count), columns = beside ? count : 1;
  const left = (width - unit * wide * columns - gap * (columns - 1)) / 2;
  return view.extents.map((_, k) => ({
    x: left + (beside ? k * (unit * wide + gap) : 0), y: title + (beside ? 0 : k * (unit * tall + title)), w: unit * aspect, h: unit,
  }));
}

const boxOf = (view, p, panel) => [
  panel.x + view.box[4 * p] * panel.w, panel.y + view.box[4 * p + 1] * panel.h, view.box[4 * p + 2] * panel.w, view.box[4 * p + 3] * panel.h,
];

function drawFrame(c, reader, state, width, height, theme, mates) {
  const view = reader.view, panels = placePanels(view, width, height), tokens = view.ofFrame[state.frame];
  panels.forEach((panel, k) => {
    c.globalAlpha = 1;
    paintPicture(c, view, state.frame, panel.x, panel.y, panel.w, panel.h, theme);
    if (view.panels.length > 1) { c.fillStyle = theme.faint; c.font = theme.font; c.textAlign = "left"; c.fillText(view.panels[k], panel.x, panel.y - 5); }
  });
  for (const p of tokens) {
    const [x, y, w, h] = boxOf(view, p, panels[view.panel[p]]), rim = w > 8 && h > 8 ? 0.5 : 0; // tells cells apart
    paintToken(c, reader, state, p, [x + rim, y + rim, w - 2 * rim, h - 2 * rim], theme, false);
  }
  c.globalAlpha = 1;
  const p = state.token;
  if (p < 0) return;
  c.lineWidth = 2;
  for (const q of tokens) if (mates[q] > 0 && q !== p) outline(c, boxOf(view, q, panels[view.panel[q]]), `rgba(255,255,255,${0.35 + 0.65 * mates[q]})`);
  const own = boxOf(view, p, panels[view.panel[p]]), target = targetOf(reader, state, p);
  if (view.frame[p] === state.frame) outline(c, own, "#ff4fd8");
  if (target !== p) arrow(c, own, boxOf(view, target, panels[view.panel[target]]), view.frame[target] !== view.frame[p]);
}

/** The token that p follows or is merged into, p itself if none. */
function targetOf(reader, state, p) {
  if (state.overlay === "links") return reader.view.links.target[p];
  const code = reader.code(p, state.site, state.layer, state.vector);
  return code === ITSELF || code === ZERO ? p : follow(reader.view, p, code);
}

function outline(c, [x, y, w, h], colour) {
  c.strokeStyle = "rgba(0,0,0,.6)"; c.lineWidth = 4; c.strokeRect(x + 1, y + 1, w - 2, h - 2);
  c.strokeStyle = colour; c.lineWidth = 2; c.strokeRect(x + 1, y + 1, w - 2, h - 2);
}

/** From one cell's centre to another's; dashed into another frame, a ring where that is the same place. */
function arrow(c, [x0, y0, w0, h0], [x1, y1, w1, h1], dashed) {
  const [ax, ay, bx, by] = [x0 + w0 / 2, y0 + h0 / 2, x1 + w1 / 2, y1 + h1 / 2], angle = Math.atan2(by - ay, bx - ax);
  for (const [colour, width] of [["rgba(0,0,0,.7)", 5], ["#ff4fd8", 2.5]]) {
    c.strokeStyle = colour; c.lineWidth = width; c.setLineDash(dashed ? [5, 4] : []);
    c.beginPath();
    if (Math.hypot(bx - ax, by - ay) < 1) c.arc(ax, ay, Math.min(w0, h0) / 3, 0, 7);
    else {
      c.moveTo(ax, ay); c.lineTo(bx, by);
      c.moveTo(bx - 8 * Math.cos(angle - 0.5), by - 8 * Math.sin(angle - 0.5)); c.lineTo(bx, by);
      c.lineTo(bx - 8 * Math.cos(angle + 0.5), by - 8 * Math.sin(angle + 0.5));
    }
    c.stroke();
  }
  c.setLineDash([]);
}

/** Rows and size of the film strip's pictures for a width. */
function placeStrip(view, width) {
  const count = view.pictures.count, aspect = view.pictures.width / view.pictures.height, gap = 3;
  let rows = 1;
  while (rows < 4 && width / Math.ceil(count / rows) < 38) rows++;
  const columns = Math.ceil(count / rows), w = Math.min(width / columns - gap, 62 * aspect), h = w / aspect;
  const box = (frame) => [(frame % columns) * (w + gap) + 2, Math.floor(frame / columns) * (h + gap) + 2, w, h];
  return { height: rows * (h + gap) + 4, box, w, h };
}

/** Sparsity and similarity by layer, one small chart a site, and the retained tokens. */
function drawLayers(c, reader, state, width, height, theme) {
  const view = reader.view, places = [];
  SITES.concat("retained").forEach((site, k) => {
    const cell = { x: (k % 3) * (width / 3) + 27, y: Math.floor(k / 3) * (height / 2) + 15, w: width / 3 - 34, h: height / 2 - 32 };
    const slot = cell.w / view.layers, bar = (layer, from, to, colour) => {
      c.fillStyle = colour;
      c.fillRect(cell.x + layer * slot + slot * 0.1, cell.y + cell.h * (1 - to), slot * 0.8, cell.h * (to - from));
    };
    c.fillStyle = site === state.site ? theme.soft : theme.back;
    c.fillRect(cell.x, cell.y, cell.w, cell.h);
    c.fillStyle = theme.accent; c.globalAlpha = 0.25;
    c.fillRect(cell.x + state.layer * slot, cell.y, slot, cell.h);
    c.globalAlpha = 1;
    for (let layer = 0; layer < view.layers; layer++) {
      if (site === "retained") { bar(layer, 0, view.retained[layer] / view.tokens, OKABE_ITO[2]); continue; }
      const { zero, sparsity } = reader.shares(site, layer, state.threshold);
      bar(layer, 0, zero, EMPTY);
      bar(layer, zero, sparsity, SIMILAR);
    }
    if (site !== "retained" && view.sites[site].means) {
      c.strokeStyle = c.fillStyle = COMPUTED; c.lineWidth = 1.5; c.beginPath();
      view.sites[site].means.forEach((mean, l) => c.lineTo(cell.x + (l + 0.5) * slot, cell.y + cell.h * (1 - mean)));
      c.stroke();
    }
    c.strokeStyle = site === state.site ? theme.accent : theme.line; c.lineWidth = site === state.site ? 1.5 : 1;
    c.strokeRect(cell.x, cell.y, cell.w, cell.h);
    c.font = theme.font; c.fillStyle = theme.text; c.textAlign = "left";
    c.fillText(site === "retained" ? `tokens kept, of ${view.tokens}` : site, cell.x, cell.y - 4);
    c.fillStyle = theme.faint; c.textAlign = "right";
    c.fillText("100", cell.x - 4, cell.y + 8); c.fillText("0 %", cell.x - 4, cell.y + cell.h);
    c.textAlign = "left"; c.fillText("0", cell.x, cell.y + cell.h + 11);
    c.textAlign = "right"; c.fillText(`layer ${view.layers - 1}`, cell.x + cell.w, cell.y + cell.h + 11);
    places.push({ site, ...cell, slot });
  });
  return places;
}

/** How the best similarities at a site are distributed, with the threshold as a line. Returns the plot's place. */
function drawHistogram(c, reader, state, width, height, theme) {
  const view = reader.view, s = view.sites[state.site], bins = 50, plot = { x: 42, y: 14, w: width - 54, h: height - 44 };
  c.font = theme.font; c.textAlign = "left"; c.fillStyle = theme.text;
  c.fillText(`best similarities, ${state.site}, layer ${state.layer} (counts on a square-root scale)`, plot.x, 10);
  const total = view.tokens * s.vectors - s.zeros[state.layer], row = state.layer * view.thresholds.length;
  const above = Array.from({ length: bins + 1 }, (_, k) => (k === 0 ? total : k === bins ? 0 : s.above[row + reader.step(k / bins)]));
  const counts = above.slice(0, bins).map((count, k) => count - above[k + 1]), most = Math.max(1, ...counts);
  const at = plot.x + plot.w * state.threshold;
  counts.forEach((count, k) => {
    const x = plot.x + (plot.w * k) / bins, w = plot.w / bins - 1, h = plot.h * Math.sqrt(count / most), split = clamp(at - x, 0, w);
    c.fillStyle = COMPUTED; c.fillRect(x, plot.y + plot.h - h, split, h);
    c.fillStyle = SIMILAR; c.fillRect(x + split, plot.y + plot.h - h, w - split, h);
  });
  c.strokeStyle = theme.line; c.lineWidth = 1; c.strokeRect(plot.x, plot.y, plot.w, plot.h);
  if (view.threshold !== null && view.threshold <= 1) {
    const x = plot.x + plot.w * view.threshold;
    c.strokeStyle = theme.faint; c.setLineDash([4, 3]); c.beginPath(); c.moveTo(x, plot.y); c.lineTo(x, plot.y + plot.h); c.stroke(); c.setLineDash([]);
  }
  c.strokeStyle = c.fillStyle = theme.text; c.lineWidth = 2; c.beginPath(); c.moveTo(at, plot.y); c.lineTo(at, plot.y + plot.h + 4); c.stroke();
  c.beginPath(); c.moveTo(at, plot.y + plot.h + 2); c.lineTo(at - 5, plot.y + plot.h + 10); c.lineTo(at + 5, plot.y + plot.h + 10); c.fill();
  c.fillStyle = theme.faint; c.textAlign = "center";
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) c.fillText(tick.toFixed(1), plot.x + plot.w * tick, plot.y + plot.h + 20);
  c.fillText("cosine similarity", plot.x + plot.w / 2, height - 1);
  c.textAlign = "right"; c.fillText(engineering(most), plot.x - 3, plot.y + 8); c.fillText("0", plot.x - 3, plot.y + plot.h);
  return plot;
}

// ---- component ----------------------------------------------------------------------------------------------------

const HTML = `
<div class="fx-head"><div class="fx-title"></div><div class="fx-question"></div><div class="fx-facts"></div></div>
<div class="fx-body"><div class="fx-left">
  <canvas class="fx-frame" role="img" aria-label="the frame with its visual tokens"></canvas>
  <div class="fx-row"><button class="fx-play" title="play (space)">▶</button>
    <input class="fx-frames" type="range" min="0" step="1" aria-label="frame"><output class="fx-frameno"></output></div>
  <div class="fx-token"></div>
</div><div class="fx-right">
  <div class="fx-row">
    <label>show <select class="fx-overlay"></select></label><label>site <select class="fx-site"></select></label>
    <label>vector <select class="fx-vector"></select></label>
  </div>
  <div class="fx-row">
    <label class="fx-wide">layer <input class="fx-layer" type="range" min="0" step="1"><output class="fx-layerno"></output></label>
    <label class="fx-wide">opacity <input class="fx-opacity" type="range" min="0" max="1" step="0.05"></label>
  </div>
  <div class="fx-legend"></div>
  <canvas class="fx-layers" role="img" aria-label="sparsity and similarity by layer and site"></canvas>
  <div class="fx-key"></div>
  <canvas class="fx-histogram" role="img" aria-label="distribution of the best similarity"></canvas>
  <div class="fx-row fx-thresholds"><label class="fx-wide">threshold τ
    <input class="fx-threshold" type="range" min="0" max="1" step="0.001"></label><button class="fx-reset" title="the run's threshold">reset</button></div>
  <div class="fx-sparsity" aria-live="polite"></div>
</div></div>
<canvas class="fx-strip" role="img" aria-label="film strip"></canvas>
<div class="fx-notes"></div>`;
const KEYS = "Keys: ← → frame · ↑ ↓ layer · [ ] site · , . threshold · o overlay · space play · click a token to hold it";

/**
 * Show a view (of readView) in an element. state: to start from; onState: called with the state after every change.
 * Returns { state, theme, view, set, sparsity, redraw, destroy }, also kept as element.explorer.
 */
function mountExplorer(element, view, state = {}, onState = () => {}) {
  const reader = new Reader(view), root = document.createElement("div");
  root.className = "fx";
  root.tabIndex = 0;
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab would take the arrow keys
  root.innerHTML = HTML;
  element.replaceChildren(root);
  const get = (name) => root.querySelector(`.fx-${name}`);
  const overlays = Object.keys(OVERLAYS).filter((name) => OVERLAYS[name].exists(view));
  const labelOf = (name) => (name === "links" ? view.links.title : OVERLAYS[name].label);
  view.floor = similarityFloor(view);
  const defaults = {
    frame: 0, layer: 0, site: "q_proj", overlay: !view.applied && overlays.includes("ranking") ? "ranking" : overlays[0], vector: -1, token: -1, opacity: 0.65, threshold: view.threshold ?? 0,
  };
  state = valid({ ...defaults, ...state });
  let hover = -1, theme = null, destroyed = false, pending = 0, timer = 0, layerPlaces = [], plot = null, strip = null, mates = null, mateKey = "";

  function valid(s) {
    s.frame = clamp(s.frame, 0, view.pictures.count - 1);
    s.layer = clamp(s.layer, 0, view.layers - 1);
    if (!SITES.includes(s.site)) s.site = "q_proj";
    if (!overlays.includes(s.overlay)) s.overlay = overlays[0];
    s.vector = clamp(s.vector, -1, view.sites[s.site].shown.length - 1);
    if (s.overlay === "group" && s.vector < 0) s.vector = 0;
    if (s.token >= view.tokens) s.token = -1;
    return s;
  }
  function set(change) {
    state = valid({ ...state, ...change });
    schedule();
    onState(state);
  }
  const schedule = () => { if (!pending) pending = requestAnimationFrame(() => { pending = 0; redraw(); }); };

  function redraw() {
    if (get("left").clientWidth < 50) { // hidden, as JupyterLab does while it changes its theme
      if (!destroyed) setTimeout(schedule, 200);
      return;
    }
    theme ??= readTheme(root);
    const shown = { ...state, token: hover >= 0 ? hover : state.token };
    const key = `${shown.token} ${state.site} ${state.layer} ${state.vector} ${state.overlay === "links"}`;
    if (key !== mateKey) {
      mateKey = key;
      mates = shown.token < 0 ? null : state.overlay === "links" ? reader.linked(shown.token) : reader.companions(shown.token, state.site, state.layer, state.vector);
    }
    const left = get("left").clientWidth, right = get("right").clientWidth;
    const tall = view.panels.length > 1 ? 400 : Math.min(400, (left * view.pictures.height) / view.pictures.width);
    drawFrame(prepare(get("frame"), left, tall), reader, shown, left, tall, theme, mates);
    layerPlaces = drawLayers(prepare(get("layers"), right, 176), reader, state, right, 176, theme);
    if (view.threshold !== null) plot = drawHistogram(prepare(get("histogram"), right, 128), reader, state, right, 128, theme);
    drawStrip(shown);
    drawText(shown);
  }

  /** The strip's cells only change with the overlay, so they are kept; a new frame or token only draws over them. */
  function drawStrip(shown) {
    const width = root.clientWidth - 24, counts = state.overlay === "similar" || state.overlay === "kinds" ? state.threshold : null;
    const key = JSON.stringify([width, state.overlay, state.layer, state.site, state.vector, counts, state.opacity, theme.dim]);
    const place = placeStrip(view, width), c = prepare(get("strip"), width, place.height);
    if (!strip || strip.key !== key) {
      strip = { key, cells: strip?.cells ?? document.createElement("canvas") };
      const painter = new PixelPainter(width, place.height);
      prepare(strip.cells, width, place.height);
      for (let p = 0; p < view.tokens; p++) if (view.panel[p] === 0 && view.box[4 * p] < 1) {
        const [x, y, w, h] = place.box(view.frame[p]);
        paintToken(painter, reader, state, p, boxOf(view, p, { x, y, w, h }), theme, true);
      }
      strip.cells.getContext("2d").putImageData(painter.sheet, 0, 0);
    }
    view.ofFrame.forEach((_, frame) => paintPicture(c, view, frame, ...place.box(frame), theme));
    c.drawImage(strip.cells, 0, 0, width, place.height);
    if (mates) for (let q = 0; q < view.tokens; q++) if (mates[q] > 0 && view.panel[q] === 0) {
      const [x, y, w, h] = place.box(view.frame[q]), box = boxOf(view, q, { x, y, w, h });
      c.fillStyle = q === shown.token ? "#ff4fd8" : `rgba(255,255,255,${0.3 + 0.7 * mates[q]})`;
      c.fillRect(box[0], box[1], box[2], box[3]);
    }
    const [x, y, w, h] = place.box(state.frame);
    c.strokeStyle = theme.accent; c.lineWidth = 3; c.strokeRect(x - 0.5, y - 0.5, w + 1, h + 1);
  }

  function drawText(shown) {
    get("frames").value = state.frame;
    get("frameno").textContent = `frame ${state.frame + 1} of ${view.pictures.count}${view.names.length ? `: ${view.names[state.frame]}` : ""}`;
    get("layer").value = state.layer;
    get("layerno").textContent = `${state.layer}`;
    get("overlay").value = state.overlay;
    if (get("site").value !== state.site || !get("vector").options.length) fillVectors();
    get("site").value = state.site;
    get("vector").value = state.vector;
    get("opacity").value = state.opacity;
    get("threshold").value = state.threshold;
    drawLegend();
    const { similar, zero, sparsity } = reader.shares(state.site, state.layer, state.threshold);
    const at = view.threshold === null ? "" : `τ ${+state.threshold.toFixed(4)}: `, out = get("sparsity");
    out.dataset.value = sparsity;
    out.innerHTML = `${at}sparsity <b>${percent(sparsity)}</b> = similar ${percent(similar)} + zero ${percent(zero)}, ${state.site}, layer ${state.layer}`;
    if (view.threshold !== null && state.threshold !== view.threshold) {
      const own = reader.shares(state.site, state.layer, view.threshold).sparsity;
      out.innerHTML += ` <span class="fx-faint">(the run, τ ${view.threshold}: ${percent(own)}). From the inputs of this run: another threshold would change those of later sites and layers.</span>`;
    }
    get("token").textContent = describe(shown.token);
  }

  function drawLegend() {
    const { low, high, items, unit } = OVERLAYS[state.overlay].legend(reader, state), box = get("legend");
    const swatch = ([label, colour]) => `<span class="fx-item"><i style="background:${colour}"></i>${label}</span>`;
    const scale = low === undefined ? "" : `${low}<i class="fx-scale" style="background:linear-gradient(90deg,${VIRIDIS.join()})"></i>${high}`;
    const html = `${scale}${(items ?? []).map(swatch).join("")}<span class="fx-faint">${unit}</span>` +
      (OVERLAYS[state.overlay].all || state.overlay === "none" ? "" : `<span class="fx-item"><i class="fx-gone"></i>dropped</span>`);
    if (box.dataset.html !== html) { box.dataset.html = html; box.innerHTML = html; }
  }

  function fillVectors() {
    const { shown, vectors } = view.sites[state.site];
    get("vector").innerHTML = `<option value="-1">all ${vectors}</option>` + shown.map((v, j) => `<option value="${j}">${v}</option>`).join("");
  }

  /** What is known of a token, in words. */
  function describe(p) {
    if (p < 0) return "Point at a token to see its numbers, the neighbour it follows and its group.";
    const { site, layer, vector } = state, s = view.sites[site], at = layer * view.tokens + p, parts = [`Token ${p}, ${view.names[view.frame[p]] ?? `frame ${view.frame[p] + 1}`}`];
    const dropped = view.dropped[p];
    if (dropped >= 0) parts.push(`dropped in layer ${dropped >> 1} ${dropped & 1 ? "before its MLP" : "before its attention"}`);
    if (reader.present(p, site, layer)) {
      parts.push(`${s.similar[at]} similar, ${s.zero[at]} zero, ${s.vectors - s.similar[at] - s.zero[at]} computed of ${s.vectors} vectors`);
      if (s.mean) parts.push(`best similarity ${reader.similarity(p, site, layer, vector).toFixed(3)}${vector < 0 ? " (mean)" : ""}`);
      const code = reader.code(p, site, layer, vector);
      if (code !== ITSELF && code !== ZERO) parts.push(`follows token ${follow(view, p, code)} (${PLACES[placeOf(view.candidates[code - 1])]})`);
      if (view.importance) parts.push(`prompt importance ${((view.importance[at] / 65535) * view.importance_most[layer]).toPrecision(2)}`);
      const size = mates ? mates.reduce((n, share) => n + (share > 0), 0) : 0;
      if (size > 1) parts.push(`shares a mean with ${size - 1} other token${size > 2 ? "s" : ""}`);
    }
    if (view.rankings?.length) {
      const { scores, place, by, count } = reader.ranking(state);
      const rank = `rank ${1 + count - Math.floor((count * place[p]) / 65535)} of ${count}`;
      if (place[p]) parts.push(`${by}: ${scores[p] === Infinity ? "always kept" : `${scores[p].toPrecision(3)}, ${rank}`}`);
    }
    if (view.links) parts.push(view.links.kinds[view.links.kind[p]] + (view.links.target[p] === p ? "" : ` (token ${view.links.target[p]})`));
    return parts.join(" · ");
  }

  function tokenAt(event) {
    const box = get("frame").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const panels = placePanels(view, box.width, box.height);
    return view.ofFrame[state.frame].find((p) => {
      const [left, top, w, h] = boxOf(view, p, panels[view.panel[p]]);
      return x >= left && x < left + w && y >= top && y < top + h;
    }) ?? -1;
  }
  const inside = (canvas, event) => { const box = get(canvas).getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const dragThreshold = (event) => { if (plot) set({ threshold: Math.round(1000 * clamp((inside("histogram", event)[0] - plot.x) / plot.w, 0, 1)) / 1000 }); };
  const pointAt = (p) => { if (p !== hover) { hover = p; schedule(); } };
  const move = (name, list, by) => set({ [name]: list[(list.indexOf(state[name]) + by + list.length) % list.length] });

  function play() {
    get("play").textContent = timer ? "▶" : "⏸";
    if (timer) { clearInterval(timer); timer = 0; return; }
    timer = setInterval(() => (root.isConnected ? set({ frame: (state.frame + 1) % view.pictures.count }) : clearInterval(timer)), 350);
  }

  function onKey(event) {
    const on = event.target.tagName, typing = on === "SELECT" || on === "INPUT", steps = {
      ArrowRight: () => set({ frame: (state.frame + 1) % view.pictures.count }),
      ArrowLeft: () => set({ frame: (state.frame + view.pictures.count - 1) % view.pictures.count }),
      ArrowUp: () => set({ layer: state.layer + 1 }), ArrowDown: () => set({ layer: state.layer - 1 }),
      "]": () => move("site", SITES, 1), "[": () => move("site", SITES, -1), o: () => move("overlay", overlays, 1),
      ".": () => view.threshold !== null && set({ threshold: Math.min(1, Math.round(1000 * state.threshold + 5) / 1000) }),
      ",": () => view.threshold !== null && set({ threshold: Math.max(0, Math.round(1000 * state.threshold - 5) / 1000) }),
      " ": play, Escape: () => set({ token: -1 }),
    };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if ((typing && event.key.startsWith("Arrow")) || (on === "SELECT" && event.key === " ") || (on === "BUTTON" && event.key === " ")) return;
    event.preventDefault();
    steps[event.key]();
  }

  // fixed texts and ranges
  get("title").textContent = view.title;
  get("question").textContent = view.question;
  get("facts").innerHTML = facts(view);
  get("notes").textContent = [...view.notes, KEYS].join("  ");
  get("key").innerHTML = `<span class="fx-item"><i style="background:${SIMILAR}"></i>similar</span><span class="fx-item"><i style="background:${EMPTY}"></i>zero</span>` +
    (view.sites.query.means ? `<span class="fx-item"><i class="fx-stroke" style="background:${COMPUTED}"></i>mean best similarity</span>` : "") +
    `<span class="fx-faint">% of all vectors by layer${view.threshold === null ? "" : ", at the threshold below"}; click a chart to go there</span>`;
  get("frames").max = view.pictures.count - 1;
  get("layer").max = view.layers - 1;
  get("overlay").innerHTML = overlays.map((name) => `<option value="${name}">${labelOf(name)}</option>`).join("");
  get("site").innerHTML = SITES.map((site) => `<option>${site}</option>`).join("");
  get("site").value = "";
  get("frames").disabled = get("play").disabled = view.pictures.count < 2;
  get("thresholds").hidden = get("histogram").hidden = view.threshold === null; // a trace has no similarities

  // events
  const on = (name, event, act) => get(name).addEventListener(event, act);
  for (const [name, field] of [["frames", "frame"], ["layer", "layer"], ["opacity", "opacity"], ["threshold", "threshold"]])
    on(name, "input", (event) => set({ [field]: Number(event.target.value) }));
  for (const name of ["overlay", "site"]) on(name, "change", (event) => set({ [name]: event.target.value }));
  on("vector", "change", (event) => set({ vector: Number(event.target.value) }));
  on("reset", "click", () => set({ threshold: view.threshold }));
  on("play", "click", play);
  on("frame", "pointermove", (event) => pointAt(tokenAt(event)));
  on("frame", "pointerleave", () => pointAt(-1));
  on("frame", "click", (event) => { const p = tokenAt(event); set({ token: p === state.token ? -1 : p }); });
  on("strip", "click", (event) => {
    const [x, y] = inside("strip", event), place = placeStrip(view, root.clientWidth - 24);
    const frame = view.ofFrame.findIndex((_, f) => { const [a, b, w, h] = place.box(f); return x >= a && x < a + w && y >= b && y < b + h; });
    if (frame >= 0) set({ frame });
  });
  on("layers", "click", (event) => {
    const [x, y] = inside("layers", event), hit = layerPlaces.find((cell) => x >= cell.x && x < cell.x + cell.w && y >= cell.y && y < cell.y + cell.h);
    if (hit) set({ layer: Math.floor((x - hit.x) / hit.slot), ...(hit.site === "retained" ? {} : { site: hit.site }) });
  });
  on("histogram", "pointerdown", (event) => { get("histogram").setPointerCapture(event.pointerId); dragThreshold(event); });
  on("histogram", "pointermove", (event) => { if (event.buttons) dragThreshold(event); });
  root.addEventListener("keydown", onKey);
  const retheme = () => { theme = null; schedule(); }; // read when drawn
  const themes = new MutationObserver(retheme), dark = matchMedia("(prefers-color-scheme: dark)"), sizes = new ResizeObserver(schedule);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-theme", "class"] });
  dark.addEventListener("change", retheme);
  sizes.observe(root);

  const api = {
    get state() { return { ...state }; },
    get theme() { return theme && root.dataset.theme; }, // null until it is drawn
    view, set, redraw,
    sparsity: (site, layer, threshold) => reader.shares(site, layer, threshold).sparsity,
    destroy() { destroyed = true; clearInterval(timer); themes.disconnect(); sizes.disconnect(); dark.removeEventListener("change", retheme); },
  };
  element.explorer = api;
  redraw();
  return api;
}

/** The heat map starts at the similarity that 2 % of the tokens with a neighbour are below, in tenths: most lie near 1. */
function similarityFloor(view) {
  const means = SITES.flatMap((site) => {
    const s = view.sites[site], step = Math.max(1, Math.floor((s.mean?.length ?? 0) / 5000)), some = [];
    for (let i = 0; s.mean && i < s.mean.length; i += step) if (s.mean[i] > 0) some.push(s.mean[i]);
    return some;
  }).sort((a, b) => a - b);
  return means.length ? Math.min(0.9, Math.floor(means[Math.floor(0.02 * means.length)] / 25.5) / 10) : 0;
}

/** Answers and operation counts as HTML; texts come from a model, so they are escaped. */
function facts(view) {
  const text = (value) => Object.assign(document.createElement("i"), { textContent: value }).innerHTML;
  const answers = Object.entries(view.answers).map(([name, answer]) => `<span>${text(name)} answers <b>${text(answer.length > 60 ? `${answer.slice(0, 60)}…` : answer) || "(nothing)"}</b></span>`);
  const counts = Object.entries(view.operations), dense = view.operations.dense;
  const operations = counts.map(([name, count]) => `<span>${text(name)} <b>${engineering(count)}</b> multiplications${name === "dense" ? "" : ` (${percent(1 - count / dense)} saved)`}</span>`);
  return [...answers, ...operations].join("");
}

function engineering(count) {
  const power = clamp(Math.floor(Math.log10(Math.max(1, count)) / 3), 0, 5);
  return `${power ? (count / 1000 ** power).toPrecision(3) : count} ${["", "k", "M", "G", "T", "P"][power]}`;
}

/** Light or dark, as JupyterLab (or an exported notebook) says, else as the system does; and the colours to draw with. */
function readTheme(root) {
  const lab = document.body.dataset.jpThemeLight, chosen = document.body.dataset.theme;
  const dark = lab !== undefined ? lab === "false" : chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "dark" : "light";
  const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(`--fx-${name}`).trim();
  return {
    text: colour("text"), faint: colour("faint"), line: colour("line"), soft: colour("soft"), back: colour("back"),
    accent: colour("accent"), dim: colour("dim"), font: "11px system-ui, sans-serif",
  };
}
