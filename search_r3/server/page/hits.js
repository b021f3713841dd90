// Lists of hits: why each stands where it does, and what reasoning changed.
// Text from the server or the index only ever becomes text.
import { capital, fetchJson } from "./server.js";

export function element(tag, className, ...content) {
  // An element with texts and elements in it; null and "" are left out.
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content.filter(Boolean));
  return made;
}

export function button(className, text, act) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export const plural = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;

export function explained({ hits, explanation, query, index }) {
  // The hits, each with the question, the index, and what the server says `about` it.
  return hits.map((hit, i) => ({ ...hit, query, index, about: explanation?.hits[i] ?? {} }));
}

export function absence({ hits, explanation }) {
  // That nothing fits well, and which words of the question occur nowhere; perhaps "".
  if (!explanation) return "";
  const parts = hits.length && explanation.hits.every((one) => one.weak) ? ["Nothing here matches well."] : [];
  const words = explanation.missing_words;
  if (words.length) parts.push(`In no document: ${words.join(", ")}.`);
  return parts.join(" ");
}

export function searchedAs({ query, normalized_query: normalized }) {
  // The question with its typos corrected, as it was embedded; "" if only its case was changed.
  return normalized && normalized.toLowerCase() !== query.toLowerCase() ? `Searched by meaning as: ${normalized}` : "";
}

export function merged(off, on = off) {
  // The hits of both lists as rows {hit, rank, was, change}: those with reasoning first, then those that are gone.
  const before = new Map(off.map((hit, i) => [hit.id, i + 1]));
  const after = new Set(on.map((hit) => hit.id));
  const rows = on.map((hit, i) => {
    const rank = i + 1, was = before.get(hit.id);
    return { hit, rank, was, change: was === undefined ? "new" : was > rank ? "up" : was < rank ? "down" : "" };
  });
  const gone = off.filter((hit) => !after.has(hit.id));
  return [...rows, ...gone.map((hit) => ({ hit, rank: null, was: before.get(hit.id), change: "gone" }))];
}

export function verdict(off, on, what) {
  // What changed from `off` to `on`, by `what`: reasoning or reading.
  const rows = merged(off, on);
  const count = (change) => rows.filter((row) => row.change === change).length;
  const [fresh, gone, moved] = [count("new"), count("gone"), count("up") + count("down")];
  if (!fresh && !gone && !moved) return on.length ? `${capital(what)} changed nothing in the first ${on.length}.` : "";
  const parts = [[fresh, "new"], [gone, "gone"], [moved, "moved"]].filter(([n]) => n).map(([n, what]) => `${n} ${what}`);
  const first = off[0]?.id === on[0]?.id ? "the first place kept" : "the first place changed";
  return `${capital(what)}: ${[...parts, first].join(", ")}.`;
}

function movement({ change, was }) {
  if (!change) return null;
  const said = { up: `▲ from ${was}`, down: `▼ from ${was}`, gone: `gone, was ${was}` };
  return element("span", `moved ${change}`, said[change] ?? change);
}

function why(hit) {
  // The hit's rank and score in each list that has it.
  const { ranks, scores } = hit;
  const line = element("p", "why",
    ranks.vector && element("span", "by meaning", `meaning #${ranks.vector} · cosine ${scores.vector.toFixed(2)}`),
    ranks.text && element("span", "by words", `words #${ranks.text} · ${scores.text.toFixed(1)}`));
  line.title = `score ${hit.score.toFixed(4)}`;
  return line;
}

const BESIDE = 240; // characters that are shown of a passage beside an opened one

function fill(place, text, marks, near) {
  // Put `text` into `place` with its marks (start, end, whose word it is) and the range `near`, in code points.
  const points = [...text], [from, to] = near ?? [0, 0];
  const ends = [...new Set([0, points.length, from, to, ...marks.flatMap(([start, end]) => [start, end])])].sort((a, b) => a - b);
  place.replaceChildren(...ends.slice(1).map((end, i) => {
    const start = ends[i], part = points.slice(start, end).join("");
    const mark = marks.find(([first, last]) => first <= start && end <= last);
    const tinted = from <= start && end <= to ? "near" : "";
    if (!mark && !tinted) return part;
    return element(mark ? "mark" : "span", `${mark?.[2] === "reasoning" ? "thought " : ""}${tinted}`.trim(), part);
  }));
}

// A snippet with the lines of a paragraph joined; its length stays.
const flowing = (text) => text.replace(/\n(?=[\p{Ll}(]|(?<![.!?]\n)\p{N})/gu, " ");

function snippetOf(hit) {
  // The snippet with its marks, with ellipses where the passage goes on.
  const shown = element("p", "snippet"), { snippet_span: span, snippet_marks: marks } = hit.about;
  shown.dir = "auto";
  fill(shown, flowing(hit.snippet), marks ?? hit.highlights, hit.near);
  const left = [...hit.text].slice(0, span?.[0] ?? 0).join("").replace(/^[#\s]+|[=~#\s-]+$/g, "");
  if (!hit.title.endsWith(left)) shown.prepend("… "); // more than the heading, which is the title, is left out
  if (span?.[1] < [...hit.text.trimEnd()].length) shown.append(" …");
  return shown;
}

// A text in a filter (SQL).
export const quoted = (text) => `'${text.replaceAll("'", "''")}'`;

function beside({ id, document: name, query, index }, step) {
  // The end of the passage before (-1), or the beginning of the one after (1).
  const shown = element("p", "beside");
  shown.dir = "auto";
  const number = Number(id.slice(name.length + 1)) + step; // ids are "document#number"
  const body = { query, index, where: `id = ${quoted(`${name}#${number}`)}`, k: 1, mode: "vector", reasoning: false };
  if (id !== name && number > 0) fetchJson("v1/search", { body }).then(({ hits: [hit] }) => {
    const points = [...hit.text], part = step < 0 ? points.slice(-BESIDE) : points.slice(0, BESIDE);
    shown.append(step < 0 ? "… " : "", part.join(""), step < 0 ? "" : " …");
  }).catch(() => {}); // there is none
  return shown;
}

function passageOf(hit) {
  // The whole passage with its marks, the ends of its neighbors, and where it is.
  const text = element("p", "snippet");
  text.dir = "auto";
  text.tabIndex = 0;
  fill(text, hit.text, hit.about.marks ?? []);
  const place = hit.path && (hit.start_line > 0 ? `${hit.path}:${hit.start_line}-${hit.end_line}` : pageOf(hit));
  const copy = place && navigator.clipboard && button("copy", `Copy ${place}`,
    () => navigator.clipboard.writeText(place).then(() => { copy.textContent = "Copied"; }));
  return element("div", "whole", beside(hit, -1), text, beside(hit, 1), copy);
}

const atLine = (path, line) => path && line > 0 && `${path}:${line}`;

function sameOf(hit) {
  // "+4 documents with the same text", which opens to their places.
  const same = hit.about.same ?? [];
  if (!same.length) return null;
  return element("details", "same", element("summary", "", `+${plural(same.length, "document")} with the same text`),
    ...same.map((one) => element("p", "place", atLine(one.path, one.start_line) || one.path || one.document)));
}

export function sentencesOf(hit) {
  const found = [];
  let start = 0;
  for (const { segment } of new Intl.Segmenter("en", { granularity: "sentence" }).segment(flowing(hit.snippet))) {
    const end = start + [...segment].length;
    if (/\p{L}/u.test(segment)) found.push([start, end]);
    start = end;
  }
  return found;
}

const RECORDS = /\.(jsonl|ndjson|csv|tsv|parquet)$/i;

function pageOf(hit) {
  // "report.pdf, page 12"; in records, "page" is a field of the user's own.
  const field = ["page", "slide", "cell"].find((name) => Number.isInteger(hit.metadata?.[name]));
  return field && !RECORDS.test(hit.path) ? `${hit.path}, ${field} ${hit.metadata[field]}` : hit.path;
}

const placeOf = (hit) => (hit.path ? atLine(hit.path, hit.snippet_line) || pageOf(hit) : hit.title && hit.id);

function item(row) {
  // One row of a list; its title opens and closes the passage.
  const { hit, rank } = row;
  const place = placeOf(hit), { weak } = hit.about;
  const title = button("title", hit.title && hit.title !== hit.path ? hit.title : place || hit.id, () => {
    title.ariaExpanded = String(!isOpen());
    swap(isOpen() ? passageOf(hit) : snippetOf(hit));
  });
  title.dir = "auto";
  title.ariaExpanded = "false";
  let passage = snippetOf(hit);
  const swap = (next) => {
    passage.replaceWith(next);
    passage = next;
  };
  const isOpen = () => title.ariaExpanded === "true";
  hit.redraw = () => isOpen() || swap(snippetOf(hit));
  const top = element("div", "top", title, movement(row), weak && element("span", "tag", "weak match"));
  const body = element("div", "", top, place !== title.textContent && place && element("p", "place", place), why(hit), passage, sameOf(hit));
  return element("li", `${row.change === "gone" ? "gone" : ""}${weak ? " weak" : ""}`.trim(), element("span", "rank", rank && `${rank}.`), body);
}

export function showRows(list, rows, advice) {
  list.replaceChildren(...rows.map(item));
  if (!rows.length) list.append(element("li", "none", `Nothing was found. ${advice}`));
}

export const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)}\xa0ms` : `${(ms / 1000).toFixed(1)}\xa0s`);

export function figures({ timings, usage, reasoning }) {
  const { reason_ms: model, search_ms: index } = timings;
  const written = reasoning ? `, ${usage.completion_tokens} written` : "";
  return `${milliseconds(model + index)} (model ${milliseconds(model)}, index ${milliseconds(index)}) · ${usage.prompt_tokens} tokens read${written}`;
}

export function sizes({ name, documents, chunks, created }) {
  const day = created && new Date(created).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" });
  const parts = [documents !== null && plural(documents, "document"), plural(chunks, "passage")].filter(Boolean);
  return `${name}: ${parts.join(" in ")}${day ? `, made on ${day}` : ""}.`;
}
