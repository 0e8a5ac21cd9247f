/** Numbers and explanations in words. */

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (number) => whole.format(number);
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
export const megabytes = (bytes) =>
  bytes < 2 ** 20 ? `${short.format(bytes / 2 ** 10)} KiB` : `${short.format(bytes / 2 ** 20)} MiB`;
export const megapixels = (pixels) => `${short.format(pixels / 1e6)} megapixels`;

/** A time: 4.2 ms, 48 ms, 1.25 s. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 995) return `${(ms / 1000).toPrecision(3)} s`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

export function rate(tokensPerSecond) {
  if (!Number.isFinite(tokensPerSecond)) return "–";
  return tokensPerSecond < 10 ? tokensPerSecond.toFixed(1) : count(Math.round(tokensPerSecond));
}

/** The model in the header. */
export function describeModel(card) {
  const { before, kept } = card.visual_tokens_per_tile;
  const each = card.has_tiles ? " per tile" : "";
  if (!card.pruning) return [card.id, "no pruning", `${count(before)} image tokens${each}`];
  const { preset, keep } = card.pruning;
  const upTo = keep === null ? "up to " : "";
  return [card.id, preset ? `preset ${preset}` : "a rule of its own", `keeps ${upTo}${count(kept)} of ${count(before)} tokens${each}`];
}

/** What a stage of the rule does, and what it kept here. */
export function explain(stage, rule, { global, local, total, hasTiles }) {
  const each = hasTiles ? "Each tile" : "The image";
  if (stage === "global") {
    const share = short.format(rule.global_ratio * 100);
    const cut = `${each} is cut into ${rule.regions} × ${rule.regions} regions`;
    return `${cut}, and each keeps the best ${share} % of its patches: ${count(global)}.`;
  }
  if (stage === "local") {
    return `Each window of ${rule.window} × ${rule.window} patches keeps the best one that the global stage left: ${count(local)}.`;
  }
  const sum = `${count(global)} + ${count(local)} = ${count(global + local)} of ${count(total)} patches`;
  return `${sum} become tokens of the language model. The global stage finds what matters most; the local stage leaves no part of the image out.`;
}

export const explainScores = (rule) =>
  `Score: how much attention a patch gets in ${layers(rule)} of the vision encoder, on a logarithmic scale.`;

function layers({ first_layer: first, num_layers: number }) {
  return number === 1 ? `layer ${first}` : `layers ${first} to ${first + number - 1}`;
}

/** What an error is about, by its status and code. */
export function titleOf(error) {
  if (error.code === "unreachable") return "The server cannot be reached";
  if (error.code === "broken_off") return "The answer broke off";
  if (error.code === "context_length_exceeded") return "The conversation is too long";
  if (error.code === "too_many_images") return "Too many images";
  if (error.status === 429) return "The server is busy";
  if (error.status === 413 || error.code === "image_too_large") return "Too large";
  if (error.status === 401) return "The API key is not known";
  if (error.status === 408 || error.status === 504) return "It took too long";
  if (error.status === 503) return "The server is not ready";
  if (error.status >= 500 || error.code === "internal_error") return "The server failed";
  return "The server did not take this";
}
