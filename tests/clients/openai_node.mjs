// The client of OpenAI for JavaScript: whole, streamed, left, and refused.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const given = JSON.parse(readFileSync(process.env.HIVTP_CASE));
const client = new OpenAI({ baseURL: given.base_url, apiKey: given.key });
const content = [
  { type: "text", text: given.question },
  { type: "image_url", image_url: { url: given.image } },
];
const common = { model: given.model, messages: [{ role: "user", content }] };

const whole = await client.chat.completions.create(common);
assert.equal(whole.choices[0].message.content, given.answer);
assert.equal(whole.usage.prompt_tokens_details.multimodal_tokens.image, 72);

const stream = await client.chat.completions.create({
  ...common,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, given.answer);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const left = await client.chat.completions.create({ ...common, stream: true, max_tokens: 400, ignore_eos: true });
for await (const chunk of left) {
  left.controller.abort();
  break;
}

await assert.rejects(client.chat.completions.create({ ...common, model: "gpt-4" }), { status: 404, code: "model_not_found" });
await assert.rejects(client.chat.completions.create({ ...common, n: 2 }), { status: 400, param: "n" });
