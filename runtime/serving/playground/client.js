/** What is said to the server and what it answers. Addresses are relative, so that it may lie below a path. */

export class ServerError extends Error {
  /**
   * @param {string} message in the server's words, or in ours where it could not be asked.
   * @param {object} details `status` of HTTP (0 without a response), `code`, `param`, and `retryAfter` in seconds.
   */
  constructor(message, { status = 0, code = "", param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** The model that is served: an entry of /v1/models. */
export async function fetchModel(key) {
  const response = await request("v1/models", key);
  return (await response.json()).data[0];
}

/**
 * The chunks of a streamed answer.
 * @param {AbortSignal} signal closes the connection, at which the server gives the request up.
 */
export async function* streamAnswer(body, key, signal) {
  const headers = { "content-type": "application/json" };
  const content = { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await request("v1/chat/completions", key, content);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    // The status was sent before this went wrong.
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error);
    yield chunk;
  }
  throw brokenOff();
}

async function request(path, key, options = {}) {
  const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("No answer came: the server is not running, or the connection broke.", { code: "unreachable" });
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  const { status } = response;
  const seconds = Number(response.headers.get("retry-after"));
  const retryAfter = seconds > 0 ? seconds : null;
  try {
    const { error } = await response.json();
    return new ServerError(error.message, { status, code: error.code, param: error.param, retryAfter });
  } catch {
    // Of a proxy, perhaps.
    return new ServerError(`The answer was not one of hivtp's: ${status} ${response.statusText}`, { status, retryAfter });
  }
}

/** The data of server-sent events. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await read(reader);
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        // Lines that begin with a colon only keep the connection alive.
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : brokenOff();
  }
}

const brokenOff = () => new ServerError("The connection broke before the answer ended.", { code: "broken_off" });
