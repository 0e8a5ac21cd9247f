/** The page: one conversation with the model that this server serves. */

import { fetchModel, ServerError, streamAnswer } from "./client.js";
import { find, make } from "./dom.js";
import { toDataUri } from "./images.js";
import { Intake } from "./intake.js";
import { follow, Turn } from "./talk.js";
import { Viewer } from "./viewer.js";
import { counted, describeModel, megabytes } from "./words.js";

const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

const state = {
  card: null, // of the model
  key: "", // of the API; in this variable and nowhere else
  images: [], // of the conversation, in its order; those not sent yet come last
  messages: [], // { role, text, images }
  running: null, // the AbortController of the answer that streams
  failed: null, // the turn that came to nothing
  number: 0, // of conversations begun anew
};
const viewer = new Viewer(removeImage);

/* The model */

async function loadModel() {
  find("reload").hidden = true;
  try {
    state.card = await fetchModel(state.key);
  } catch (error) {
    if (error.status === 401) return wantKey();
    find("model").textContent = error.message;
    find("reload").hidden = false;
    return;
  }
  find("key-form").hidden = true;
  viewer.card = state.card;
  find("model").replaceChildren(...describeModel(state.card).map((part) => make("span", {}, part)));
  const defaults = { ...state.card.sampling_defaults, max_tokens: state.card.max_tokens };
  for (const [name, value] of Object.entries(defaults)) find(name).placeholder = value;
  find("max_tokens").max = state.card.max_tokens;
}

function wantKey() {
  find("model").textContent = "This server wants an API key";
  if (state.key) find("key-note").textContent = "The server does not know this key. Check it, and try again.";
  find("key-form").hidden = false;
  find("key").focus();
}

find("reload").addEventListener("click", loadModel);
find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = find("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    find("key-note").textContent = "A key has letters, digits and signs of ASCII, and no spaces.";
    return;
  }
  state.key = key;
  await loadModel();
  if (state.card) find("question").focus();
});

/* Images */

const intake = new Intake(
  () => ({ limits: state.card?.limits, number: state.images.length }),
  (image) => {
    state.images.push({ ...image, isSent: false, told: null });
    viewer.show(state.images, state.images.at(-1));
    find("question").focus({ preventScroll: true });
    showButtons();
  },
);

function removeImage(image) {
  state.images = state.images.filter((other) => other !== image);
  viewer.show(state.images);
  find(state.images.length ? "attach" : "choose").focus();
  showButtons();
}

/* Questions and answers */

async function ask(question) {
  state.failed?.element.remove();
  state.failed = null;
  const { number } = state;
  const images = state.images.filter((image) => !image.isSent);
  const messages = [...state.messages, { role: "user", text: question, images }];
  const turn = new Turn(question, images, state.card.id, (image) => viewer.lookAt(image));
  for (const image of images) image.isSent = true;
  viewer.show(state.images);
  state.running = new AbortController();
  showButtons();

  const found = { tokens: 0, sentAt: performance.now(), firstAt: null, lastAt: null, usage: null, server: null, reason: null };
  let error = null;
  try {
    for await (const chunk of streamAnswer(await bodyOf(messages), state.key, state.running.signal)) take(chunk, found, turn);
  } catch (caught) {
    error = caught;
  }
  // The conversation that it was part of may be gone.
  if (number !== state.number) return;
  state.running = null;
  const isStopped = error?.name === "AbortError";
  if (error && !isStopped && !(error instanceof ServerError)) error = new ServerError(`This page failed: ${error.message}`);

  if (turn.text || !error) {
    state.messages = [...messages, { role: "assistant", text: turn.text, images: [] }];
    turn.finish(timingOf(found), found.server, found.usage, noteOn(found, isStopped));
    if (error && !isStopped) turn.fail(error);
  } else {
    // It never happened: its images go with the next question.
    for (const image of images) image.isSent = false;
    state.failed = turn;
    if (isStopped) turn.drop("Stopped before the first word.");
    else turn.fail(error, namesOf(messages), () => ask(question));
    if (!find("question").value) find("question").value = question;
    if (error.status === 401) wantKey();
  }
  viewer.show(state.images);
  showButtons();
  if (error) follow();
}

/** Take what a chunk brings. */
function take(chunk, found, turn) {
  if (chunk.hivtp?.images) {
    chunk.hivtp.images.forEach((told, index) => (state.images[index].told = told));
    viewer.show(state.images);
  }
  found.server = chunk.hivtp?.timings ?? found.server;
  found.usage = chunk.usage ?? found.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  found.lastAt = performance.now();
  found.firstAt ??= found.lastAt;
  found.tokens = found.usage.completion_tokens;
  found.reason = choice.finish_reason ?? found.reason;
  if (choice.delta.content) turn.add(choice.delta.content, timingOf(found));
}

function timingOf({ tokens, sentAt, firstAt, lastAt }) {
  const seconds = (lastAt - firstAt) / 1000;
  const ttft = firstAt === null ? null : firstAt - sentAt;
  return { tokens, ttft, tokensPerSecond: (tokens - 1) / seconds };
}

function noteOn({ reason, tokens }, isStopped) {
  if (isStopped) return "Stopped.";
  return reason === "length" ? `Cut at the limit of ${counted(tokens, "token")}.` : "";
}

/** The body of a request. */
async function bodyOf(messages) {
  const sent = [];
  const system = find("system").value.trim();
  if (system) sent.push({ role: "system", content: system });
  for (const { role, text, images } of messages) {
    const urls = await Promise.all(images.map((image) => toDataUri(image.blob)));
    const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
    sent.push({ role, content: parts.length ? [...parts, { type: "text", text }] : text });
  }
  const body = {
    model: state.card.id,
    messages: sent,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    hivtp: { include: ["kept_indices", "importance"] },
  };
  for (const name of NUMBERS) if (find(name).value !== "") body[name] = Number(find(name).value);
  const size = JSON.stringify(body).length;
  const most = state.card.limits.body_bytes;
  if (size > most) {
    const message = `The conversation takes ${megabytes(size)} with its images, and the server takes ${megabytes(most)}. Remove an image, or start over.`;
    throw new ServerError(message, { code: "body_too_large", status: 413 });
  }
  return body;
}

/** By the path of an image in a request: what people call it. */
function namesOf(messages) {
  const offset = find("system").value.trim() ? 1 : 0;
  const names = {};
  messages.forEach(({ images }, at) => {
    images.forEach(({ name }, part) => (names[`messages[${at + offset}].content[${part}].image_url.url`] = name));
  });
  return names;
}

function showButtons() {
  const send = find("send");
  send.textContent = state.running ? "Stop" : "Ask";
  send.type = state.running ? "button" : "submit";
  send.classList.toggle("stop", Boolean(state.running));
  find("restart").hidden = !state.messages.length && !state.images.length && !state.failed;
  find("question").placeholder = state.messages.length ? "Ask something else" : "Ask about the image";
  find("intro").hidden = find("turns").childElementCount > 0;
}

const stop = () => state.running?.abort();

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (state.running || !question) return;
  if (!state.card) return void loadModel();
  find("question").value = "";
  fit();
  ask(question);
});
find("send").addEventListener("click", (event) => {
  if (!state.running) return;
  event.preventDefault();
  stop();
});
find("question").addEventListener("keydown", (event) => {
  // On a phone this key begins a new line, as everywhere else there.
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
  if (!sends) return;
  event.preventDefault();
  if (!state.running) find("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
find("restart").addEventListener("click", () => {
  stop();
  state.number += 1;
  state.running = null;
  state.images = [];
  state.messages = [];
  state.failed = null;
  for (const id of ["turns", "spoken"]) find(id).replaceChildren();
  intake.clear();
  viewer.show([]);
  showButtons();
  find("question").focus();
});
// A field that is wrong must be seen.
find("settings").addEventListener("invalid", () => (find("settings").open = true), { capture: true });

/** The question's field is as high as the question. */
function fit() {
  const field = find("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 160)}px`;
}
find("question").addEventListener("input", fit);

viewer.show([]);
await loadModel();
