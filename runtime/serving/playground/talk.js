/** The conversation as it is shown: questions, answers as they stream, and what they took. */

import { find, make } from "./dom.js";
import { thumbnail } from "./images.js";
import { count, counted, duration, rate, titleOf } from "./words.js";

const THUMBNAIL = 44;
// Over fewer, a rate says more of chance than of speed.
const MIN_RATED_TOKENS = 5;

/** One question and its answer. */
export class Turn {
  /** @param {function} lookAt called with an image that shall be looked at. */
  constructor(question, images, answerer, lookAt) {
    this.images = images;
    this.lookAt = lookAt;
    this.text = "";
    this.spoken = 0;
    this.words = make("p", { class: "words" });
    this.status = make("p", { class: "status" }, "Waiting for the first token");
    this.answer = make("div", { class: "answer" }, make("p", { class: "speaker" }, answerer), this.words, this.status);
    const thumbs = images.map((image) => {
      const name = `Look at ${image.name}`;
      const button = make("button", { type: "button", class: "attached", title: name, "aria-label": name }, thumbnail(image, THUMBNAIL * 2));
      button.addEventListener("click", () => lookAt(image));
      return button;
    });
    this.element = make(
      "article",
      { class: "turn running" },
      make("div", { class: "asked" }, make("p", { class: "unseen" }, "You"), ...thumbs, make("p", {}, question)),
      this.answer,
    );
    find("turns").append(this.element);
    follow();
  }

  /** Some more of the answer. */
  add(text, timing) {
    const isNear = isNearEnd();
    this.text += text;
    this.words.textContent = this.text;
    this.status.textContent = [counted(timing.tokens, "token"), ...rated(timing)].join(" · ");
    // By whole sentences: a screen reader would read single tokens as so many words.
    const end = Math.max(...[...this.text.matchAll(/[.!?:]\s|\n/g)].map((match) => match.index + 1), 0);
    if (end > this.spoken) this.speak(end);
    follow(isNear);
  }

  /**
   * The answer is whole, or was stopped.
   * @param {string} note on how it ended, or "".
   */
  finish(timing, server, usage, note) {
    const isNear = isNearEnd();
    this.speak(this.text.length);
    this.element.classList.remove("running");
    this.status.replaceChildren(...(note ? [make("span", { class: "ended" }, note)] : []));
    this.status.hidden = !note;
    if (usage) this.answer.append(figures(timing, server, usage));
    if (this.images[0]?.told) {
      const show = make("button", { type: "button", class: "link narrow" }, "Show the patches");
      show.addEventListener("click", () => this.lookAt(this.images[0]));
      this.answer.append(show);
    }
    follow(isNear);
  }

  /**
   * It came to an error.
   * @param {object} names of images, by their paths in the request.
   * @param {function} [retry] asks again.
   */
  fail(error, names = {}, retry = null) {
    this.element.classList.remove("running");
    this.element.classList.add("failed");
    this.status.remove();
    const message = Object.entries(names).reduce((text, [path, name]) => text.replaceAll(path, name), asSentence(error.message));
    const words = [make("p", { class: "title" }, titleOf(error)), make("p", {}, message)];
    if (error.retryAfter) words.push(make("p", {}, `There may be room in ${counted(error.retryAfter, "second")}.`));
    const last = make("p", { class: "row" });
    if (retry) {
      const again = make("button", { type: "button", class: "quiet" }, "Ask again");
      again.addEventListener("click", retry);
      last.append(again);
      if (error.retryAfter) countDown(again, error.retryAfter);
    }
    last.append(make("span", { class: "fine" }, [error.status, error.code].filter(Boolean).join(" · ")));
    this.answer.append(make("div", { class: "error", role: "alert" }, ...words, last));
  }

  /** It was stopped before its first word. */
  drop(note) {
    this.element.classList.remove("running");
    this.element.classList.add("failed");
    this.status.textContent = note;
  }

  speak(end) {
    const part = this.text.slice(this.spoken, end).trim();
    this.spoken = end;
    if (part) find("spoken").append(make("p", {}, part));
  }
}

const rated = ({ tokens, tokensPerSecond }) => (tokens >= MIN_RATED_TOKENS ? [`${rate(tokensPerSecond)} tokens/s`] : []);

/** What an answer took, in the browser and in the server. */
function figures(timing, server, usage) {
  const details = usage.prompt_tokens_details;
  const cached = details.cached_tokens ? `, ${count(details.cached_tokens)} of them known from before` : "";
  const summary = [
    `${duration(timing.ttft)} to the first token`,
    ...rated(timing),
    counted(usage.completion_tokens, "token"),
  ];
  const rows = [
    ["Time to the first token", duration(timing.ttft), duration(server?.ttft_ms)],
    ["Tokens per second", rated(timing).length ? rate(timing.tokensPerSecond) : "–", rate(1000 / (server?.decode_ms_per_token ?? NaN))],
    ["Waiting for others", "", duration(server?.queue_ms)],
    ["Reading the images", "", duration(server?.preprocess_ms)],
    ["Vision encoder and pruning", "", duration(server?.vision_ms)],
    ["Prefill of the prompt", "", duration(server?.prefill_ms)],
  ];
  const cells = (tag, values) => values.map((value, at) => make(at ? tag : "th", at ? {} : { scope: "row" }, value));
  const table = make(
    "table",
    {},
    make("thead", {}, make("tr", {}, make("td"), make("th", { scope: "col" }, "in this browser"), make("th", { scope: "col" }, "in the server"))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))),
  );
  const image = `${count(details.unpruned_multimodal_tokens.image)} → ${count(details.multimodal_tokens.image)} image tokens`;
  const found = make(
    "details",
    { class: "figures" },
    make("summary", {}, summary.join(" · ")),
    table,
    make("p", { class: "fine" }, `Prompt: ${counted(usage.prompt_tokens, "token")}${cached}. In it: ${image}.`),
  );
  // Opened at the end of the log, it would open out of sight.
  found.addEventListener("toggle", () => found.open && found.scrollIntoView({ block: "nearest" }));
  return found;
}

function asSentence(message) {
  // A path into the request stays as it is.
  const first = /^\w+ /.test(message) ? message.charAt(0).toUpperCase() : message.charAt(0);
  return `${first}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}`;
}

/** A button that says for how long to wait. */
function countDown(button, seconds) {
  const words = button.textContent;
  const tick = () => {
    button.textContent = seconds > 0 ? `${words} (${seconds} s)` : words;
    if (seconds > 0) setTimeout(tick, 1000);
    seconds -= 1;
  };
  tick();
}

/** What scrolls: the log where it has a column of its own, else the page. */
function scroller() {
  const log = find("log");
  return getComputedStyle(log).overflowY === "auto" ? log : document.scrollingElement;
}

function isNearEnd() {
  const element = scroller();
  return element.scrollHeight - element.scrollTop - element.clientHeight < 80;
}

/** Scroll to the end. */
export function follow(isWanted = true) {
  if (isWanted) scroller().scrollTop = scroller().scrollHeight;
}
