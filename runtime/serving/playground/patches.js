/** Where pruning kept what, drawn over the image. */

// Dropped patches lose their colour, and most of their light.
const SCRIM = "rgba(14, 16, 20, 0.7)";
const UNSEEN = "rgba(14, 16, 20, 0.86)";
// From low to high scores.
const RAMP = [[20, 11, 53], [106, 23, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]];
const RAMP_OPACITY = 0.86;

/**
 * One view of an image, as one grid of all its tiles.
 *
 * @param {object} told of an image by the server: `grid`, `views`, `width`, `height`.
 * @param {number} index of the view.
 * @returns `rows`, `cols` of patches; `tileRows`, `tileCols`, those of one tile; `region` [left, top, right, bottom] in
 *   pixels of the image; `size` of the image; `extent`, the region and the image together; by patch `stages` ("global", "local", "kept" or
 *   null), and `scores` (null: padding), or null where there are none.
 */
export function readView(told, index) {
  const { tile_rows: down, tile_cols: across, region, tiles } = told.views[index];
  const [tileRows, tileCols] = told.grid;
  const [rows, cols] = [down * tileRows, across * tileCols];
  const stages = new Array(rows * cols).fill(null);
  const hasScores = tiles.every((tile) => tile.importance?.length);
  const scores = hasScores ? new Array(rows * cols).fill(null) : null;
  tiles.forEach((tile, number) => {
    const top = Math.floor(number / across) * tileRows;
    const left = (number % across) * tileCols;
    const place = (patch) => (top + Math.floor(patch / tileCols)) * cols + left + (patch % tileCols);
    tile.kept_indices.forEach((patch, at) => {
      stages[place(patch)] = !tile.is_global ? "kept" : tile.is_global[at] ? "global" : "local";
    });
    if (hasScores) tile.importance.forEach((score, patch) => (scores[place(patch)] = score));
  });
  const [left, top, right, bottom] = region;
  const extent = [Math.min(left, 0), Math.min(top, 0), Math.max(right, told.width), Math.max(bottom, told.height)];
  const size = [told.width, told.height];
  return { rows, cols, tileRows, tileCols, region, extent, size, stages, scores };
}

/** How many patches each stage kept, and how many there are, those of the padding left out. */
export function countStages({ stages, scores }) {
  const number = (stage) => stages.filter((one) => one === stage).length;
  const total = scores ? scores.filter((score) => score !== null).length : stages.length;
  return { global: number("global"), local: number("local"), kept: number("kept"), total };
}

/** Whether a patch that a stage kept is shown while the slider is at `shown`. */
export const isShown = (stage, shown) => stage !== null && (shown === "both" || stage === "kept" || stage === shown);

/** The edges of patches in pixels of a canvas: whole ones, so that neighbours share them. */
function edgesOf(view, width, height) {
  const [left, top, right, bottom] = view.region;
  const [x0, y0, x1, y1] = view.extent;
  const edges = (number, first, last, origin, end, size) =>
    Array.from({ length: number + 1 }, (_, at) =>
      Math.round((((last - first) * at) / number + first - origin) * (size / (end - origin))),
    );
  return { xs: edges(view.cols, left, right, x0, x1, width), ys: edges(view.rows, top, bottom, y0, y1, height) };
}

/** The patch at a point of a canvas, or null. */
export function patchAt(view, width, height, x, y) {
  const { xs, ys } = edgesOf(view, width, height);
  const [col, row] = [xs.findLastIndex((edge) => edge <= x), ys.findLastIndex((edge) => edge <= y)];
  return col >= 0 && row >= 0 && col < view.cols && row < view.rows ? row * view.cols + col : null;
}

/**
 * Draw an image, and where there is a view, what pruning kept of it.
 *
 * @param {HTMLCanvasElement} canvas as large as it shall be.
 * @param {CanvasImageSource} preview of the image.
 * @param {object|null} view see `readView`.
 * @param {object} options `shown` ("global", "both" or "local"), `hasScores` (draw these), `rule` of the model, `cursor`
 *   (a patch, or null), `colours` by stage, `scale` (pixels of the canvas to one of the page).
 */
export function drawPatches(canvas, preview, view, options) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "#888";
  context.fillRect(0, 0, width, height);
  drawPreview(context, preview, view, width, height);
  if (!view) return;
  const { xs, ys } = edgesOf(view, width, height);
  const patches = view.stages.map((stage, patch) => {
    const [row, col] = [Math.floor(patch / view.cols), patch % view.cols];
    const box = [xs[col], ys[row], xs[col + 1] - xs[col], ys[row + 1] - ys[row]];
    return { box, stage, isShown: isShown(stage, options.shown) };
  });
  dropOutside(context, xs, ys, width, height);
  if (options.hasScores && view.scores) drawScores(context, view, patches);
  else dropHidden(context, patches);
  drawLines(context, view, xs, ys, options);
  for (const { box, stage, isShown: shown } of patches) if (shown) outline(context, box, options.colours[stage], options.scale);
  if (options.cursor !== null) drawCursor(context, patches[options.cursor].box, options.scale);
}

function drawPreview(context, preview, view, width, height) {
  const [x0, y0, x1, y1] = view?.extent ?? [0, 0, 1, 1];
  const [w, h] = view?.size ?? [1, 1];
  const [across, down] = [width / (x1 - x0), height / (y1 - y0)];
  // Small images are shown pixel by pixel, as they are.
  context.imageSmoothingEnabled = w * across < 2.5 * preview.width;
  context.imageSmoothingQuality = "high";
  context.drawImage(preview, -x0 * across, -y0 * down, w * across, h * down);
}

/** What is cut off before the model sees the image. */
function dropOutside(context, xs, ys, width, height) {
  context.fillStyle = UNSEEN;
  const path = new Path2D();
  path.rect(0, 0, width, height);
  path.rect(xs[0], ys[0], xs.at(-1) - xs[0], ys.at(-1) - ys[0]);
  context.fill(path, "evenodd");
}

function dropHidden(context, patches) {
  const path = new Path2D();
  for (const { box, isShown: shown } of patches) if (!shown) path.rect(...box);
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fill(path);
  context.globalCompositeOperation = "source-over";
  context.fillStyle = SCRIM;
  context.fill(path);
}

function drawScores(context, { scores }, patches) {
  const logs = scores.map((score) => (score === null ? null : Math.log(Math.max(score, 1e-12))));
  const found = logs.filter((log) => log !== null);
  const low = found.reduce((a, b) => Math.min(a, b), Infinity);
  const high = found.reduce((a, b) => Math.max(a, b), -Infinity);
  patches.forEach(({ box }, patch) => {
    const log = logs[patch];
    context.fillStyle = log === null ? UNSEEN : rampColour((log - low) / (high - low || 1));
    context.fillRect(...box);
  });
}

/** The colour of a score, 0 to 1. */
function rampColour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const first = Math.min(Math.floor(at), RAMP.length - 2);
  const [red, green, blue] = RAMP[first].map((from, channel) => Math.round(from + (RAMP[first + 1][channel] - from) * (at - first)));
  return `rgba(${red}, ${green}, ${blue}, ${RAMP_OPACITY})`;
}

/** The colours of scores from low to high. */
export function drawRamp(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = rampColour(x / (canvas.width - 1));
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/** The edges of tiles, and of the regions or windows that the stage shown works in. */
function drawLines(context, view, xs, ys, { shown, rule, scale }) {
  const draw = (cols, rows, colour, thickness) => {
    context.fillStyle = colour;
    for (const col of cols) context.fillRect(Math.round(xs[col] - thickness / 2), ys[0], thickness, ys.at(-1) - ys[0]);
    for (const row of rows) context.fillRect(xs[0], Math.round(ys[row] - thickness / 2), xs.at(-1) - xs[0], thickness);
  };
  if (rule && shown !== "both") {
    const inner = (number, tile) => cuts(number, tile).flatMap((start) => parts(tile, rule, shown).map((part) => start + part));
    const thickness = Math.max(1, Math.round((shown === "global" ? 2 : 1) * scale));
    draw(inner(view.cols, view.tileCols), inner(view.rows, view.tileRows), "rgba(255, 255, 255, 0.6)", thickness);
  }
  const between = (number, tile) => cuts(number, tile).slice(1);
  draw(between(view.cols, view.tileCols), between(view.rows, view.tileRows), "#fff", Math.round(3 * scale));
}

/** Where regions or windows begin in a tile, but for the first. */
function parts(tile, rule, shown) {
  if (shown === "local") return cuts(tile, rule.window).slice(1);
  return Array.from({ length: rule.regions - 1 }, (_, at) => Math.floor(((at + 1) * tile) / rule.regions));
}

/** 0, step, 2 step, ... below a number. */
const cuts = (number, step) => Array.from({ length: Math.ceil(number / step) }, (_, at) => at * step);

function outline(context, [x, y, width, height], colour, scale) {
  const thickness = Math.max(1, Math.round(Math.min(2 * scale, width * 0.12)));
  context.lineWidth = thickness;
  context.strokeStyle = colour;
  context.strokeRect(x + thickness / 2, y + thickness / 2, width - thickness, height - thickness);
}

function drawCursor(context, [x, y, width, height], scale) {
  const thickness = Math.max(2, Math.round(2 * scale));
  for (const [colour, out] of [["#000", 1.5], ["#fff", 0.5]]) {
    context.lineWidth = thickness;
    context.strokeStyle = colour;
    const by = out * thickness;
    context.strokeRect(x - by, y - by, width + 2 * by, height + 2 * by);
  }
}
