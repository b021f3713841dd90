// Requests to the server: JSON, server-sent events, and errors as one line for people.

export function apiKey(key) {
  // The key that this tab keeps, "" without one; `key`, if it is given, is kept from now on.
  try {
    if (key !== undefined) sessionStorage.setItem("api-key", key);
    return sessionStorage.getItem("api-key") ?? "";
  } catch { return ""; } // storage is disabled; the page works without it
}

export function themeButton(button) {
  // Let the button change the colors; its name is what it changes them to.
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  function name() {
    button.textContent = isDark() ? "Light" : "Dark";
    button.ariaLabel = `${button.textContent} colors`;
  }
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
    try {
      localStorage.setItem("theme", document.documentElement.dataset.theme);
    } catch { /* storage is disabled */ }
  });
  prefersDark.addEventListener("change", name);
  name();
}

export class AskError extends Error {
  // An error to show, of an HTTP status; `wait` is in seconds.
  constructor(message, status = 0, wait = NaN) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

async function* eventsOf(body) {
  // The server-sent events of a response as {event, data}.
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const { event, data } = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/)));
      if (data) yield { event, data: JSON.parse(data) };
    }
  }
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not the server's own: a proxy's page */ }
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new AskError(error.message || `the server answered ${response.status}`, response.status, wait);
}

async function answered(path, { body, signal } = {}) {
  // The response to GET, or to POST of `body` as JSON; throws if it is an error.
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (!response.ok) throw await refusal(response);
  return response;
}

export const fetchJson = async (path, options) => (await answered(path, options)).json();

export async function vectors(body, signal) {
  // The embeddings of `body.input` as arrays of numbers.
  const { data } = await fetchJson("v1/embeddings", { body: { ...body, encoding_format: "base64" }, signal });
  return data.map(({ embedding }) => new Float32Array(Uint8Array.from(atob(embedding), (c) => c.charCodeAt(0)).buffer));
}

export async function search(body, signal, onText) {
  const started = performance.now();
  const response = await answered("v1/search", { body: { ...body, stream: true }, signal });
  for await (const { event, data } of eventsOf(response.body)) {
    if (event === "reasoning") onText(data.text);
    if (event === "error") throw new AskError(data.error.message);
    if (event === "result") return { ...data, seen: performance.now() - started };
  }
  throw new AskError("the connection ended before the answer came");
}

export const capital = (text) => text[0].toUpperCase() + text.slice(1);

export function inWords(problem) {
  // An error as one plain sentence.
  let text = problem instanceof AskError ? problem.message
    : problem instanceof TypeError ? "the server cannot be reached; is search-r3 serve still running?"
      : `the answer could not be read (${problem.message})`;
  if (problem.status === 401) text = apiKey() ? "this key is not known to the server" : "this server wants a key: paste it below";
  text = capital(text);
  const { wait } = problem;
  if (wait >= 0) text += ` (in about ${wait} ${wait === 1 ? "second" : "seconds"})`;
  return `${text}.`.replace("?.", "?");
}
