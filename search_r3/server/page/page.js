// The page of a Search-R3 server: one question, asked twice, with the reasoning shown as it is generated.
// The address holds the question and its options.
import { apiKey, AskError, capital, fetchJson, inWords, search, themeButton, vectors } from "./server.js";
import { absence, button, element, explained, figures, merged, milliseconds, plural, quoted, searchedAs, sentencesOf, showRows, sizes, verdict } from "./hits.js";

const BUDGETS = [8, 16, 32, 64, 128, 256];
const USUAL_BUDGET = 32;
const MOST_RESULTS = 1000;
const MORE = 5;
const READ = 120; // characters that are shown of a passage that was read
const TINTED = 5; // hits of which the nearest sentence is tinted
const POLL = 2000; // milliseconds between checks of a server that is still loading
const SPECIAL = { auto: "where it helps (auto)", latent: "without words (latent)" };
const WORDLESS = { auto: "The model's rule did not expect reasoning to help here.", latent: "In steps that have no words." };
const STATES = {
  loading: "The server is loading its model…", stopping: "The server is shutting down.",
  index_unavailable: "The index cannot be searched now; the server keeps checking.",
};
const OPTIONS = ["index", "budget", "given", "k", "mode", "folder", "type", "view"]; // fields, and names in the address
const FOUND = ["index", "folder", "type"]; // their choices depend on what is indexed

const $ = (id) => document.getElementById(id);
const say = (text) => { $("status").textContent = text; };
const hide = (...ids) => { for (const id of ids) $(id).hidden = true; };
const has = (field, value) => [...field.options].some((option) => option.value === value);
const wide = window.matchMedia("(min-width: 48rem)");
const usual = {}; // field -> its default, which the address leaves out
let running = null; // the AbortController of the question being answered
let ready = false;
let answer = null; // {asked, off, on} of the question that is shown
const reading = 2; // passages to be read

themeButton($("theme"));

function showProblem(problem) {
  // One plain line, with "Try again" if that may help, or with a field for the key.
  const { status = 0 } = problem;
  $("problem").textContent = inWords(problem);
  $("again").hidden = status >= 400 && status < 500 && ![408, 429].includes(status);
  $("key-form").hidden = status !== 401;
  if (status === 401) {
    apiKey("");
    $("key").focus();
  }
}

function clearProblem() {
  $("problem").textContent = "";
  hide("again", "key-form");
}

function readAddress() {
  // Set the fields to what the address says, or to their defaults.
  const given = new URLSearchParams(location.search);
  $("question").value = given.get("q") ?? "";
  for (const name of OPTIONS) {
    const field = $(name), value = given.get(name) ?? usual[name] ?? "";
    if (field.tagName === "SELECT" && value && !has(field, value)) {
      if (!FOUND.includes(name)) continue;
      field.add(new Option(value)); // perhaps a folder that is not among the largest
    }
    field.value = value;
    if (value && value !== usual[name]) field.parentElement.hidden = false;
  }
  offerWords();
}

const offerWords = () => { $("words").hidden = $("budget").value !== "given"; };

function writeAddress(push) {
  const said = new URLSearchParams();
  const query = $("question").value.trim();
  if (query) said.set("q", query);
  for (const name of OPTIONS) if ($(name).value && $(name).value !== usual[name]) said.set(name, $(name).value);
  const address = `${location.pathname}${said.size ? `?${said}` : ""}`;
  document.title = query ? `${query} · Search-R3` : "Search-R3";
  if (address === location.pathname + location.search) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
}

function filter() {
  // The API's `where` for the chosen folder and kind of file; null for all.
  const folder = $("folder").value, type = $("type").value;
  const patterns = [folder && `${folder}%`, type && `%${type}`].filter(Boolean);
  return patterns.map((pattern) => `path LIKE ${quoted(pattern)}`).join(" AND ") || null;
}

function missing(name, text) {
  $("problem").textContent = text;
  $("options").open = true;
  $(name).focus();
  return null;
}

function chosen() {
  // The body of the direct request, and what the second one has in addition (`thinking`); null if something is missing.
  const query = $("question").value.trim();
  if (!query) {
    say("Type a question first.");
    $("results").classList.toggle("stale", !$("results").hidden);
    $("question").focus();
    return null;
  }
  const k = $("k").valueAsNumber;
  if (!Number.isInteger(k) || k < 1 || k > MOST_RESULTS) {
    return missing("k", `Results: give a whole number from 1 to ${MOST_RESULTS.toLocaleString("en")}.`);
  }
  const budget = $("budget").value, mode = $("mode").value, where = filter(), given = $("given").value.trim();
  if (budget === "given" && mode !== "text" && !given) {
    return missing("given", "Write your own reasoning, or choose another kind.");
  }
  const thinking = mode === "text" || budget === "off" ? null
    : budget === "given" ? { reasoning: true, reasoning_text: given }
      : budget === "read" ? { reasoning: false, read: reading }
        : { reasoning: Number(budget) || budget };
  const body = { query, index: $("index").value || undefined, k, mode, explain: true, reasoning: false };
  return { body: where === null ? body : { ...body, where }, thinking };
}

async function start({ push = true } = {}) {
  if (!ready) return;
  clearProblem();
  const asked = chosen();
  if (!asked) return;
  writeAddress(push);
  running?.abort();
  const mine = new AbortController();
  running = mine;
  begin();
  try {
    const off = await search(asked.body, mine.signal, () => {});
    answer = { asked, off: { ...off, hits: explained(off) }, on: null };
    show(asked);
    if (asked.thinking) {
      say(`The model is ${kindOf(asked.thinking)}…`);
      $("reasoning-title").textContent = asked.thinking.read ? "Passages read" : asked.thinking.reasoning_text ? "Your reasoning" : "Reasoning";
      $("reasoning").hidden = false;
      $("reasoning").ariaBusy = "true";
      const on = await search({ ...asked.body, ...asked.thinking }, mine.signal, (text) => $("reasoning-text").append(text));
      answer.on = { ...on, hits: explained(on) };
      show(asked);
    }
    say(summary(answer));
    tint(asked, mine.signal);
  } catch (problem) {
    if (running !== mine) return; // another question was asked meanwhile
    say("");
    if (problem.name === "AbortError") {
      say(answer?.asked === asked ? `Stopped. The results are without ${kindOf(asked.thinking)}.` : "Stopped.");
      if (!$("reasoning-text").textContent) $("reasoning").hidden = true;
      $("question").focus();
    } else showProblem(problem);
  } finally {
    if (running === mine) {
      running = null;
      $("reasoning").ariaBusy = "false";
      $("stop").hidden = true;
      $("go").hidden = false;
    }
  }
}

function begin() {
  // Results on screen stay, gray, until there are new ones.
  $("stop").hidden = false;
  hide("go", "empty", "reasoning");
  for (const name of ["reasoning-text", "reasoning-end", "read"]) $(name).textContent = "";
  $("results").classList.add("stale");
  say("Searching…");
}

function show({ body, thinking }) {
  const { off, on } = answer;
  const side = $("view").value === "side" && Boolean(thinking), what = kindOf(thinking);
  const advice = body.mode === "text" ? "No passage has these words: search by meaning." : body.where ? "Search all folders and kinds of files." : "";
  $("results").hidden = false;
  $("results").classList.remove("stale");
  $("one").hidden = side;
  $("columns").hidden = !side;
  if (side) {
    showRows($("off-hits"), merged(off.hits), advice);
    if (on) showRows($("on-hits"), merged(off.hits, on.hits).filter((row) => row.rank), advice);
    else $("on-hits").replaceChildren();
    for (const [name, one] of [["off", off], ["on", on]]) {
      $(`${name}-title`).textContent = `With${name === "on" ? "" : "out"} ${what}`;
      $(`${name}-figures`).textContent = one ? figures(one) : `${what}…`;
    }
  } else showRows($("hits"), merged(off.hits, on?.hits), advice);
  $("searched").textContent = searchedAs(off);
  $("absent").textContent = absence(on ?? off);
  $("verdict").textContent = on && (on.reasoning || thinking.reasoning !== "auto") ? verdict(off.hits, on.hits, what) : "";
  if (on) {
    if (on.reasoning) $("reasoning-text").textContent = on.reasoning.text;
    $("read").replaceChildren(...(on.read ?? []).map(passageRead));
    $("reasoning-end").textContent = endOfReasoning(on, thinking);
  }
  const { k } = body, most = Math.min(k + MORE, MOST_RESULTS);
  $("more").hidden = off.hits.length < k || most <= k;
  $("more").textContent = `Show ${most - k} more`;
}

async function tint({ body, thinking }, signal) {
  // Tint the sentence of each hit that is nearest to the question, as the model embeds both.
  const hits = (answer.on ?? answer.off).hits.slice(0, TINTED), model = $("model").textContent;
  try {
    const parts = hits.flatMap((hit) => sentencesOf(hit).map(([start, end]) => ({ hit, start, end })));
    if (body.mode === "text" || parts.length <= hits.length) return;
    const input = parts.map(({ hit, start, end }) => [...hit.snippet].slice(start, end).join(""));
    const [query] = await vectors({ model, input: body.query, input_type: "query", reasoning: Number(thinking?.reasoning) || false }, signal);
    const near = await vectors({ model, input }, signal);
    parts.forEach(({ hit, start, end }, i) => {
      const best = near[i].reduce((sum, value, j) => sum + value * query[j], 0); // the cosine, as both have length 1
      if (!(hit.best >= best)) Object.assign(hit, { best, near: [start, end] });
    });
    for (const hit of hits) hit.redraw?.();
  } catch { /* it was only a help */ }
}

const kindOf = (thinking) => (thinking?.read ? "reading" : "reasoning");

function passageRead({ title, document: name, text }) {
  // A passage that the model read, which begins with its title.
  const rest = text.slice(title && text.startsWith(title) ? title.length : 0).trim();
  return element("li", "", element("b", "", title || name), ` ${rest.slice(0, READ)}${rest.length > READ ? "…" : ""}`);
}

function endOfReasoning({ reasoning: trace, remembered_ms: once }, { reasoning: budget, reasoning_text: given }) {
  if (!trace) return WORDLESS[budget] ?? "";
  const tokens = `${trace.num_tokens} tokens`;
  if (given) return `${tokens}, given by you.`;
  if (!trace.text.trim()) $("reasoning-text").textContent = "(nothing)";
  const count = !trace.forced ? `${tokens}, finished by itself.` : trace.num_tokens >= budget ? `Cut off at ${tokens}.` : `${tokens}.`;
  return once ? `${count} Remembered from an earlier question: writing it took ${milliseconds(once)}.` : count;
}

function summary({ asked, off, on }) {
  const cut = off.usage.truncated_texts ? ` Only the first ${off.usage.prompt_tokens} tokens of the question were read.` : "";
  const one = plural(off.hits.length, "result");
  const text = on
    ? `${one} without ${kindOf(asked.thinking)} in ${milliseconds(off.seen)}, ${on.hits.length} with it in ${milliseconds(on.seen)}${on.remembered_ms ? " (remembered)" : ""}.`
    : `${one} in ${milliseconds(off.seen)}.`;
  return text + cut;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
for (const name of ["mode", "folder", "type"]) $(name).addEventListener("change", () => answer && start());
$("budget").addEventListener("change", offerWords);
$("view").addEventListener("change", () => {
  writeAddress(false);
  if (answer) show(answer.asked);
});
$("more").addEventListener("click", async () => {
  const shown = titles(lists()[0]).length;
  $("k").value = String(Math.min($("k").valueAsNumber + MORE, MOST_RESULTS));
  await start();
  titles(lists()[0])[shown]?.focus();
});
$("again").addEventListener("click", () => (ready ? start({ push: false }) : load()));
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
  apiKey(key);
  clearProblem();
  $("question").focus();
  describe();
  if ($("question").value.trim()) start({ push: false });
});
$("index").addEventListener("change", () => {
  $("folder").value = $("type").value = "";
  describe();
  if (answer) start();
  else writeAddress(false);
});
window.addEventListener("popstate", () => {
  readAddress();
  describe();
  if ($("question").value) start({ push: false });
  else clear();
});

function clear() {
  running?.abort();
  answer = null;
  clearProblem();
  hide("results", "reasoning");
  say("");
  $("empty").hidden = false;
  document.title = "Search-R3";
  $("question").focus();
}

const lists = () => [...document.querySelectorAll("#results ol")].filter((list) => list.offsetParent !== null);
const titles = (list) => [...(list?.querySelectorAll(".title") ?? [])];

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
    lists().flatMap(titles)[0]?.focus();
  } else if (target.matches(".title")) {
    const mine = titles(target.closest("ol")), here = mine.indexOf(target);
    const column = (number) => titles(lists().at(number));
    const next = {
      ArrowDown: () => mine[here + 1],
      ArrowUp: () => mine[here - 1] ?? $("question"),
      ArrowLeft: () => column(0)[Math.min(here, column(0).length - 1)],
      ArrowRight: () => column(-1)[Math.min(here, column(-1).length - 1)],
      Home: () => mine[0],
      End: () => mine.at(-1),
    }[event.key];
    if (!next) return;
    next()?.focus();
  } else return;
  event.preventDefault();
});

function choices(name, all, usually) {
  // Let a field offer [value, text] each; what was chosen already stays. A single choice is hidden.
  const field = $(name);
  let before = field.value || usually;
  field.replaceChildren(...all.map(([value, text]) => new Option(text, value)));
  if (!has(field, before)) {
    if (FOUND.includes(name)) field.add(new Option(before));
    else before = usually;
  }
  field.value = before;
  field.parentElement.hidden = field.options.length < 2;
  usual[name] = usually;
}

function offer(limits, mayRead) {
  // The kinds of reasoning that the server allows; `limits` is the schema of `reasoning`.
  const kinds = limits?.anyOf ?? [];
  const most = kinds.find((one) => one.type === "integer")?.maximum ?? USUAL_BUDGET;
  const budgets = BUDGETS.filter((one) => one <= most);
  if (!budgets.length) budgets.push(most);
  choices("budget", [
    ...budgets.map((one) => [String(one), `up to ${one} tokens`]),
    ...kinds.filter((one) => one.const).map((one) => [one.const, SPECIAL[one.const] ?? one.const]),
    ...(mayRead ? [["read", `none, read ${reading} passages`]] : []),
    ["given", "my own words"],
    ["off", "none"],
  ], String(Math.min(USUAL_BUDGET, budgets.at(-1))));
}

const counted = ({ name, documents }) => [name, `${name} (${documents.toLocaleString("en")})`];

async function describe() {
  // What is indexed: its size, choices of folders and kinds, and headings to ask about.
  const index = $("index").value;
  let found;
  try {
    found = await fetchJson(`v1/index?${new URLSearchParams(index && { index })}`);
  } catch {
    return; // without a key, or it is unavailable: the search says so
  }
  if (index !== $("index").value) return; // another was chosen meanwhile
  $("indexed").textContent = sizes(found);
  choices("folder", [["", "all folders"], ...found.folders.map(counted)], "");
  choices("type", [["", "of all kinds"], ...found.types.map(counted)], "");
  const asks = found.headings.map((heading) => button("example", heading, () => {
    $("question").value = heading;
    start();
  }));
  $("examples").replaceChildren(...(asks.length ? [element("p", "", "For example:"), ...asks] : []));
}

async function load() {
  clearProblem();
  try {
    const health = await (await fetch("health")).json();
    if (health.status !== "ready") {
      say(STATES[health.status] ?? "The server could not load its model; its log says why.");
      if (health.status === "loading" || health.status === "index_unavailable") setTimeout(load, POLL);
      return;
    }
    $("model").textContent = $("model").title = health.model ?? "";
    say("");
    $("no-index").hidden = health.index;
    $("ask").hidden = !health.index;
    document.querySelector("footer").hidden = !health.index;
    if (!health.index) return;
    const response = await fetch("openapi.json");
    const described = response.ok ? await response.json() : null;
    const { Reasoning: limits, Read: most, IndexName: { enum: names = [] } = {} } = described?.components.schemas ?? {};
    offer(limits, most?.maximum >= reading);
    choices("index", names.map((name) => [name, name]), names[0] ?? "");
    offerWords();
    if (new URLSearchParams(location.search).size) readAddress();
    const needsKey = described?.components.securitySchemes && !apiKey();
    if (!needsKey) await describe();
    ready = true;
    if ($("question").value.trim() && location.search) start({ push: false });
    else {
      $("empty").hidden = false;
      if (document.activeElement === document.body) $("question").focus(); // not away from a field being filled in
    }
  } catch (problem) {
    say("");
    showProblem(problem instanceof AskError ? problem : new TypeError());
  }
}

const fold = () => { $("options").open = wide.matches; };
wide.addEventListener("change", fold);
fold();
offer(null);
for (const name of OPTIONS) usual[name] ??= $(name).value;
load();
