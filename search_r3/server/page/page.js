// The page of a Search-R3 server: one question, asked twice, with the reasoning shown as it is generated.
// Text from the server or the index is only ever set as textContent. No libraries, no build step.
"use strict";

const BUDGETS = [8, 16, 32, 64, 128, 256];
const USUAL_BUDGET = 32;
const POLL = 2000; // milliseconds between checks of a server that is still loading

function stored(storage, name, value) {
  // Storage may be disabled; the page works without it.
  try {
    if (value === undefined) return storage().getItem(name);
    if (value === null) storage().removeItem(name);
    else storage().setItem(name, value);
  } catch { /* forbidden */ }
  return null;
}
const local = () => window.localStorage;
const session = () => window.sessionStorage;

const theme = stored(local, "theme");
if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;

class AskError extends Error {
  // An error to show instead of an answer; `wait` is the number of seconds before a retry.
  constructor(message, { status = 0, wait = null, code = "" } = {}) {
    super(message);
    Object.assign(this, { status, wait, code });
  }
}

// ------------------------------------------------------------------------------------------------------- the server

async function* eventsOf(body) {
  // The server-sent events of a response: {event, data}, with data parsed and comments left out.
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      if (found.data) yield { event: found.event, data: JSON.parse(found.data) };
    }
  }
}

async function refusal(response) {
  // The AskError for an error response.
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not the server's own: a proxy's page */ }
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new AskError(error.message || `the server answered ${response.status}`, {
    status: response.status, wait: Number.isNaN(wait) ? null : wait, code: error.code ?? "",
  });
}

async function ask(body, signal, onText) {
  // One search, streamed; returns its result.
  const headers = { "Content-Type": "application/json" };
  const key = stored(session, "api-key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const started = performance.now();
  const response = await fetch("v1/search", {
    method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const { event, data } of eventsOf(response.body)) {
    if (event === "reasoning") onText(data.text);
    if (event === "error") throw new AskError(data.error.message, { code: data.error.code });
    if (event === "result") return { ...data, seen: performance.now() - started };
  }
  throw new AskError("the connection ended before the answer came");
}

// --------------------------------------------------------------------------------------------------------- the page

window.addEventListener("DOMContentLoaded", () => {
  const $ = (id) => document.getElementById(id);
  const sides = { off: $("off"), on: $("on") };
  let running = null; // the AbortController of the question that is being answered
  let ready = false;

  // ----- theme

  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => {
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", isDark() ? "Light colors" : "Dark colors");
  };
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    stored(local, "theme", document.documentElement.dataset.theme);
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  // ----- errors

  function showProblem(problem) {
    // One plain line, with "Try again" if that may help, and with a field for the key if one is needed.
    let text = problem instanceof AskError ? problem.message
      : problem instanceof TypeError ? "the server cannot be reached; is search-r3 serve still running?"
        : `the answer could not be read (${problem.message})`;
    text = text[0].toUpperCase() + text.slice(1);
    const { status = 0, wait = null } = problem;
    if (wait !== null) text += ` (in about ${wait} ${wait === 1 ? "second" : "seconds"})`;
    $("problem").textContent = `${text}.`.replace("?.", "?");
    $("again").hidden = status === 401 || (status >= 400 && status < 500 && status !== 429 && status !== 408);
    $("key-form").hidden = status !== 401;
    if (status === 401) {
      stored(session, "api-key", null);
      $("key").focus();
    }
  }

  function clearProblem() {
    $("problem").textContent = "";
    $("again").hidden = true;
    $("key-form").hidden = true;
  }

  // ----- results

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function highlighted(hit) {
    // The snippet with its highlights. Positions count code points, JavaScript strings count UTF-16 units.
    const shown = element("p", "snippet");
    shown.dir = "auto";
    const points = Array.from(hit.snippet);
    let at = 0;
    for (const [start, end] of hit.highlights) {
      if (start < at) continue;
      shown.append(points.slice(at, start).join(""), element("mark", "", points.slice(start, end).join("")));
      at = end;
    }
    shown.append(points.slice(at).join(""));
    return shown;
  }

  function movement(hit, rank, before) {
    // How the hit's rank differs from its rank without reasoning.
    if (!before) return null;
    const was = before.get(hit.id);
    if (was === undefined) return element("span", "moved up", "new here");
    if (was === rank) return null;
    const up = was > rank;
    return element("span", up ? "moved up" : "moved down", `${up ? "▲ up" : "▼ down"} ${Math.abs(was - rank)}`);
  }

  function placeOf(hit) {
    const parts = [];
    if (hit.path) parts.push(hit.snippet_line > 0 ? `${hit.path}:${hit.snippet_line}` : hit.path);
    else if (hit.title) parts.push(hit.id);
    parts.push(`score ${hit.score.toFixed(hit.score < 0.1 ? 4 : 3)}`);
    return parts.join(" · ");
  }

  function show(side, result, before) {
    const list = sides[side].querySelector("ol");
    list.replaceChildren();
    result.hits.forEach((hit, i) => {
      const item = element("li");
      const body = element("div");
      const top = element("div", "top");
      const title = element("button", "title", hit.title || hit.id);
      title.type = "button";
      title.dir = "auto";
      title.setAttribute("aria-expanded", "false");
      top.append(title);
      const moved = movement(hit, i + 1, before);
      if (moved) top.append(moved);
      let passage = highlighted(hit);
      passage.id = `${side}-passage-${i}`;
      title.setAttribute("aria-controls", passage.id);
      title.addEventListener("click", () => {
        const whole = title.getAttribute("aria-expanded") === "false";
        const next = whole ? element("p", "snippet whole", hit.text) : highlighted(hit);
        next.id = passage.id;
        next.dir = "auto";
        if (whole) next.tabIndex = 0;
        passage.replaceWith(next);
        passage = next;
        title.setAttribute("aria-expanded", String(whole));
      });
      body.append(top, element("p", "place", placeOf(hit)), passage);
      item.append(element("span", "rank", `${i + 1}.`), body);
      list.append(item);
    });
    if (!result.hits.length) list.append(element("li", "none", "Nothing was found."));
    const { reason_ms: reason, search_ms: search } = result.timings;
    const { prompt_tokens: read, completion_tokens: written } = result.usage;
    const tokens = side === "on" ? `${read} tokens read, ${written} written` : `${read} tokens read`;
    figures(side, `${milliseconds(reason + search)} (model ${milliseconds(reason)}, index ${milliseconds(search)}) · ${tokens}`);
    return new Map(result.hits.map((hit, i) => [hit.id, i + 1]));
  }

  const figures = (side, text) => { sides[side].querySelector(".figures").textContent = text; };
  const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

  function endOfReasoning(result, budget) {
    const trace = result.reasoning;
    if (!trace) return "The model's rule did not expect reasoning to help here.";
    if (!trace.text.trim()) $("reasoning-text").textContent = "(nothing)";
    if (!trace.forced) return `${trace.num_tokens} tokens; it ended by itself.`;
    return trace.num_tokens >= budget ? `Cut off at ${trace.num_tokens} tokens.` : `${trace.num_tokens} tokens.`;
  }

  // ----- asking

  const wholeNumber = (text) => (/^\d+$/.test(text) ? Number(text) : NaN);

  async function start() {
    const query = $("question").value.trim();
    if (!ready || !query) {
      $("question").focus();
      if (ready) $("status").textContent = "Type a question first.";
      return;
    }
    const k = wholeNumber($("k").value);
    if (!(k >= 1 && k <= 50)) {
      $("problem").textContent = "Results: give a whole number from 1 to 50.";
      $("k").focus();
      return;
    }
    const chosen = $("budget").value;
    const reasoning = chosen === "auto" ? "auto" : Number(chosen);
    const mode = $("mode").value;
    running?.abort();
    const mine = new AbortController();
    running = mine;
    clearProblem();
    busy(true);
    $("status").textContent = "Searching…";
    let found = null;
    try {
      const off = await ask({ query, k, mode, reasoning: false }, mine.signal, () => {});
      found = show("off", off, null);
      $("status").textContent = "The model is reasoning…";
      $("reasoning").hidden = false;
      $("reasoning").setAttribute("aria-busy", "true");
      figures("on", "reasoning…");
      const on = await ask({ query, k, mode, reasoning }, mine.signal, (text) => $("reasoning-text").append(text));
      show("on", on, found);
      if (on.reasoning) $("reasoning-text").textContent = on.reasoning.text;
      $("reasoning-end").textContent = endOfReasoning(on, chosen === "auto" ? 0 : reasoning);
      $("status").textContent = `${off.hits.length} results without reasoning in ${milliseconds(off.seen)}, `
        + `${on.hits.length} with it in ${milliseconds(on.seen)}.`;
    } catch (problem) {
      if (running !== mine) return; // another question was asked meanwhile
      $("status").textContent = "";
      figures("on", "");
      if (!found) $("columns").hidden = true;
      if (problem.name === "AbortError") {
        $("status").textContent = "Stopped.";
        if (found) figures("on", "stopped");
        $("question").focus();
      } else showProblem(problem);
    } finally {
      if (running === mine) {
        running = null;
        busy(false);
      }
    }
  }

  function busy(now) {
    $("stop").hidden = !now;
    $("go").hidden = now;
    if (!now) {
      $("reasoning").setAttribute("aria-busy", "false");
      return;
    }
    $("empty").hidden = true;
    $("reasoning").hidden = true;
    $("reasoning-text").textContent = "";
    $("reasoning-end").textContent = "";
    $("columns").hidden = false;
    for (const side of ["off", "on"]) {
      figures(side, "");
      sides[side].querySelector("ol").replaceChildren();
    }
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  $("again").addEventListener("click", () => (ready ? start() : begin()));
  $("stop").addEventListener("click", () => running?.abort());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    if (!key) return;
    $("key").value = "";
    if (!/^[\x21-\x7e]+$/.test(key)) {
      $("problem").textContent = "An API key has no spaces and no letters beyond ASCII.";
      return;
    }
    stored(session, "api-key", key);
    clearProblem();
    $("question").focus();
    start();
  });

  // ----- keys

  const titles = (side) => [...sides[side].querySelectorAll(".title")];

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const target = event.target;
    const typing = target.matches("input, select, textarea");
    if (event.key === "Escape" && running) {
      running.abort();
    } else if (event.key === "/" && !typing && !$("ask").hidden) {
      $("question").focus();
      $("question").select();
    } else if (event.key === "ArrowDown" && target === $("question")) {
      (titles("off")[0] ?? titles("on")[0])?.focus();
    } else if (target.matches(".title")) {
      const side = sides.off.contains(target) ? "off" : "on";
      const here = titles(side).indexOf(target);
      const next = {
        ArrowDown: () => titles(side)[here + 1],
        ArrowUp: () => titles(side)[here - 1] ?? $("question"),
        ArrowLeft: () => titles("off")[Math.min(here, titles("off").length - 1)],
        ArrowRight: () => titles("on")[Math.min(here, titles("on").length - 1)],
        Home: () => titles(side)[0],
        End: () => titles(side).at(-1),
      }[event.key];
      if (!next) return;
      next()?.focus();
    } else return;
    event.preventDefault();
  });

  // ----- the beginning

  function offer(limits) {
    // The budgets that the server allows.
    const choices = limits?.anyOf ?? []; // limits: the schema of `reasoning`
    const most = choices.find((one) => one.type === "integer")?.maximum ?? USUAL_BUDGET;
    const budgets = BUDGETS.filter((one) => one <= most);
    if (!budgets.length) budgets.push(most);
    const options = budgets.map((one) => {
      const option = element("option", "", `up to ${one} tokens`);
      option.value = String(one);
      return option;
    });
    if (choices.some((one) => one.enum?.includes("auto") || one.const === "auto")) {
      const auto = element("option", "", "where it helps (auto)");
      auto.value = "auto";
      options.push(auto);
    }
    const chosen = $("budget").value; // perhaps chosen already, while the server's limits were being loaded
    $("budget").replaceChildren(...options);
    const stays = options.some((option) => option.value === chosen);
    $("budget").value = stays ? chosen : String(Math.min(USUAL_BUDGET, budgets.at(-1)));
  }

  async function begin() {
    clearProblem();
    try {
      const health = await (await fetch("health")).json();
      if (health.status !== "ready") {
        $("status").textContent = health.status === "loading" ? "The server is loading its model…"
          : health.status === "stopping" ? "The server is shutting down."
            : health.status === "index_unavailable" ? "The index cannot be searched now; the server keeps checking."
              : "The server could not load its model; its log says why.";
        if (health.status === "loading" || health.status === "index_unavailable") setTimeout(begin, POLL);
        return;
      }
      $("model").textContent = health.model ?? "";
      $("model").title = health.model ?? "";
      $("status").textContent = "";
      $("no-index").hidden = health.index;
      $("ask").hidden = !health.index;
      document.querySelector("footer").hidden = !health.index;
      if (!health.index) return;
      const described = await fetch("openapi.json");
      offer(described.ok ? (await described.json()).components.schemas.Reasoning : null);
      ready = true;
      $("empty").hidden = false;
      $("question").focus();
    } catch (problem) {
      $("status").textContent = "";
      showProblem(problem);
    }
  }

  offer(null);
  begin();
});
