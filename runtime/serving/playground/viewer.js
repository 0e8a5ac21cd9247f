/** The panel of images: the one that is looked at with its patches, the stages of the rule, and a strip of all. */

import { find, make } from "./dom.js";
import { thumbnail } from "./images.js";
import { countStages, drawPatches, drawRamp, isShown, patchAt, readView } from "./patches.js";
import { count, explain, explainScores } from "./words.js";

const STAGES = ["global", "both", "local"];
const STAGE_NAMES = { global: "Global stage only", both: "Both stages", local: "Local stage only" };
const THUMBNAIL = 56;

export class Viewer {
  /** @param {function} remove called with an image that shall not be sent. */
  constructor(remove) {
    this.remove = remove;
    this.card = null;
    this.images = [];
    this.selected = null;
    this.viewIndex = 0;
    this.cursor = null;
    this.canvas = find("canvas");
    this.frame = find("frame");
    find("stage").addEventListener("input", () => this.update());
    find("scores").addEventListener("change", () => this.update());
    for (const tick of document.querySelectorAll("[data-stage]")) {
      tick.addEventListener("click", () => {
        find("stage").value = tick.dataset.stage;
        this.update();
      });
    }
    this.canvas.addEventListener("pointermove", (event) => this.point(this.patchUnder(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(this.frame);
    drawRamp(find("ramp-canvas"));
  }

  /** Show these images, and of them one. */
  show(images, selected = this.selected) {
    this.images = images;
    if (selected !== this.selected) this.cursor = null;
    this.selected = images.includes(selected) ? selected : (images.at(-1) ?? null);
    find("empty").hidden = images.length > 0;
    find("viewer").hidden = images.length === 0;
    // One that was sent and stands alone is on the canvas already.
    find("strip").hidden = images.length === 1 && images[0].isSent;
    this.showStrip();
    this.showViews();
    this.update();
  }

  /** Look at one image, and bring it into view. */
  lookAt(image) {
    this.show(this.images, image);
    find("images").scrollIntoView();
    this.canvas.focus({ preventScroll: true });
  }

  get stage() {
    return STAGES[Number(find("stage").value)];
  }

  /** What was told of the image that is looked at, if it was. */
  get view() {
    const told = this.selected?.told;
    return told ? readView(told, Math.min(this.viewIndex, told.views.length - 1)) : null;
  }

  update() {
    const { view } = this;
    find("kept").hidden = !view;
    find("waiting").hidden = Boolean(view);
    if (view) this.describe(view);
    else if (this.selected) {
      this.canvas.removeAttribute("tabindex");
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", this.selected.name);
    }
    this.draw();
  }

  /** The words around the canvas. */
  describe(view) {
    const { image_tokens: before, kept_tokens: kept, views } = this.selected.told;
    const { pruning: rule } = this.card;
    const counts = countStages(view);
    const { stage } = this;
    const hasStages = Boolean(rule) && counts.global + counts.local > 0;
    find("stages").hidden = !hasStages;
    find("scores-option").hidden = !view.scores;
    const hasScores = find("scores").checked && Boolean(view.scores);
    find("ramp").hidden = !hasScores;
    find("stage").setAttribute("aria-valuetext", STAGE_NAMES[stage]);
    for (const tick of document.querySelectorAll("[data-stage]")) {
      tick.classList.toggle("on", STAGES[tick.dataset.stage] === stage);
    }

    const fewer = Math.round((1 - kept / before) * 100);
    find("tokens").replaceChildren(
      make("span", { class: "figure" }, count(before)),
      " → ",
      make("span", { class: "figure" }, count(kept)),
      ` image tokens${fewer > 0 ? `, ${fewer} % fewer` : ""}`,
    );
    const sentences = [];
    if (hasStages) sentences.push(explain(stage, rule, { ...counts, hasTiles: this.card.has_tiles }));
    else sentences.push("This bundle prunes nothing: the language model sees every patch.");
    if (hasScores) sentences.push(explainScores(rule));
    if (isCropped(view)) sentences.push("What is dark at the edges is cut off before the model sees the image.");
    find("explanation").textContent = sentences.join(" ");

    this.canvas.setAttribute("tabindex", "0");
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "patch map");
    this.canvas.setAttribute(
      "aria-label",
      `${this.selected.name}: ${count(counts.kept + counts.global + counts.local)} of ${count(counts.total)} patches kept. Arrow keys read patch by patch.`,
    );
    find("readout").textContent = this.cursor === null ? "" : this.readPatch(view, this.cursor);
    find("views").hidden = views.length < 2;
  }

  /** One patch in words. */
  readPatch(view, patch) {
    const [row, col] = [Math.floor(patch / view.cols), patch % view.cols];
    const stage = view.stages[patch];
    const parts = [`Row ${row + 1}, column ${col + 1}`];
    if (view.scores) {
      const score = view.scores[patch];
      if (score === null) return `${parts[0]}: padding, which is never kept`;
      const others = scoresOfTile(view, row, col);
      const rank = 1 + others.filter((other) => other > score).length;
      parts.push(`score ${score.toPrecision(3)}, rank ${count(rank)} of ${count(others.length)}`);
    }
    const fate = { global: "kept by the global stage", local: "kept by the local stage", kept: "kept" };
    parts.push(stage ? fate[stage] : "dropped");
    return parts.join(" · ");
  }

  draw() {
    const { selected, view } = this;
    if (!selected || this.frame.clientWidth === 0) return;
    const extent = view?.extent ?? [0, 0, selected.width, selected.height];
    const [across, down] = [extent[2] - extent[0], extent[3] - extent[1]];
    const highest = parseFloat(getComputedStyle(this.frame).maxHeight) || Infinity;
    const fit = Math.min(this.frame.clientWidth / across, highest / down);
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [Math.max(1, Math.round(across * fit)), Math.max(1, Math.round(down * fit))];
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    drawPatches(this.canvas, selected.preview, view, {
      shown: this.stage,
      hasScores: find("scores").checked,
      rule: this.card?.pruning,
      cursor: this.cursor,
      colours: { global: colour("global"), local: colour("local"), kept: colour("kept") },
      scale,
    });
  }

  /** Look at one patch, or at none. */
  point(patch) {
    if (patch === this.cursor) return;
    this.cursor = patch;
    if (this.view) find("readout").textContent = patch === null ? "" : this.readPatch(this.view, patch);
    this.draw();
  }

  patchUnder(event) {
    const { view, canvas } = this;
    if (!view) return null;
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return patchAt(view, canvas.width, canvas.height, (event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  }

  move(event) {
    const { view } = this;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!view || !(event.key in steps)) return;
    event.preventDefault();
    if (this.cursor === null) return this.point(view.stages.findIndex((stage) => isShown(stage, this.stage)));
    const [down, across] = steps[event.key];
    const within = (value, number) => Math.min(Math.max(value, 0), number - 1);
    const row = within(Math.floor(this.cursor / view.cols) + down, view.rows);
    this.point(row * view.cols + within((this.cursor % view.cols) + across, view.cols));
  }

  showStrip() {
    const items = this.images.map((image, index) => {
      const name = `Image ${index + 1}, ${image.name}`;
      const look = make("button", { type: "button", class: "thumb", title: image.name, "aria-label": name }, thumbnail(image, THUMBNAIL * 2));
      look.setAttribute("aria-pressed", image === this.selected);
      look.addEventListener("click", () => {
        this.show(this.images, image);
        find("strip").children[index].querySelector("button").focus();
      });
      const item = make("li", { class: image.isSent ? "" : "pending" }, look);
      if (!image.isSent) {
        const cross = make("button", { type: "button", class: "remove", "aria-label": `Remove ${image.name}`, title: "Remove" }, "×");
        cross.addEventListener("click", () => this.remove(image));
        item.append(cross);
      }
      return item;
    });
    find("strip").replaceChildren(...items);
  }

  /** The choice between the base tile and the grid of tiles. */
  showViews() {
    const views = this.selected?.told?.views ?? [];
    const legend = find("views").querySelector("legend");
    const options = views.map(({ tile_rows: rows, tile_cols: cols }, index) => {
      const input = make("input", { type: "radio", name: "view", checked: index === Math.min(this.viewIndex, views.length - 1) });
      input.addEventListener("change", () => {
        this.viewIndex = index;
        this.cursor = null;
        this.update();
      });
      return make("label", {}, input, make("span", {}, index === 0 ? "Base tile" : `${rows} × ${cols} tiles`));
    });
    find("views").replaceChildren(legend, ...options);
  }
}

/** The scores of the tile that a patch lies in, without those of the padding. */
function scoresOfTile({ scores, cols, tileRows, tileCols }, row, col) {
  const [top, left] = [row - (row % tileRows), col - (col % tileCols)];
  return scores.filter((score, patch) => {
    const [down, across] = [Math.floor(patch / cols) - top, (patch % cols) - left];
    return score !== null && down >= 0 && down < tileRows && across >= 0 && across < tileCols;
  });
}

/** Whether some of the image lies outside of what the tiles show. */
function isCropped({ region: [left, top, right, bottom], size: [width, height] }) {
  return left > 0.5 || top > 0.5 || right < width - 0.5 || bottom < height - 0.5;
}
