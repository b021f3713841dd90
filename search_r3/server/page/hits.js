// Lists of hits: why each stands where it does, and what reasoning changed.
// Text from the server or the index is only ever set as textContent.

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export const plural = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;

export function explained({ hits, explanation }) {
  // The hits of a result, each with what the server says about it (`about`).
  return hits.map((hit, i) => ({ ...hit, about: explanation?.hits[i] ?? {} }));
}

export function absence({ hits, explanation }) {
  // That nothing fits well, and which words of the question occur nowhere; "" if there is nothing to say.
  if (!explanation) return "";
  const parts = hits.length && explanation.hits.every((one) => one.weak) ? ["Nothing here matches well."] : [];
  const words = explanation.missing_words;
  if (words.length) parts.push(`In no document: ${words.join(", ")}.`);
  return parts.join(" ");
}

export function merged(off, on) {
  // The hits of both lists as rows {hit, rank, was, change}: those with reasoning first, then those that are gone.
  const before = new Map(off.map((hit, i) => [hit.id, i + 1]));
  if (!on) return off.map((hit, i) => ({ hit, rank: i + 1, was: i + 1, change: "" }));
  const after = new Set(on.map((hit) => hit.id));
  const rows = on.map((hit, i) => {
    const rank = i + 1, was = before.get(hit.id);
    return { hit, rank, was, change: was === undefined ? "new" : was > rank ? "up" : was < rank ? "down" : "" };
  });
  const gone = off.filter((hit) => !after.has(hit.id));
  return [...rows, ...gone.map((hit) => ({ hit, rank: null, was: before.get(hit.id), change: "gone" }))];
}

export function verdict(off, on) {
  const rows = merged(off, on);
  const count = (change) => rows.filter((row) => row.change === change).length;
  const [fresh, gone, moved] = [count("new"), count("gone"), count("up") + count("down")];
  if (!fresh && !gone && !moved) return on.length ? `Reasoning changed nothing in the first ${on.length}.` : "";
  const parts = [[fresh, "new"], [gone, "gone"], [moved, "moved"]].filter(([n]) => n).map(([n, what]) => `${n} ${what}`);
  const first = off[0]?.id === on[0]?.id ? "the first place kept" : "another first place";
  return `Reasoning: ${[...parts, first].join(", ")}.`;
}

function movement({ change, was }) {
  if (!change) return null;
  const text = { new: "new with reasoning", up: `▲ from ${was}`, down: `▼ from ${was}`, gone: `gone, was ${was}` }[change];
  return element("span", `moved ${change}`, text);
}

function why(hit) {
  // The hit's rank and score in each list that has it, in words; the fused score only as a tooltip.
  const line = element("p", "why");
  const { ranks, scores } = hit;
  if (ranks.vector) line.append(element("span", "by meaning", `meaning #${ranks.vector} · cosine ${scores.vector.toFixed(2)}`));
  if (ranks.text) line.append(element("span", "by words", `words #${ranks.text} · ${scores.text.toFixed(1)}`));
  line.title = `score ${hit.score.toFixed(4)}`;
  return line;
}

function fill(place, text, marks, near) {
  // Put `text` into `place` with its marks (start, end, whose word it is), and the range `near` tinted; in code points.
  const points = Array.from(text), [from, to] = near ?? [0, 0];
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
const flowing = (text) => text.replace(/\n(?=[\p{Ll}\p{N}(])/gu, " ");

function snippetOf(hit) {
  // The snippet with its marks, with ellipses where the passage goes on.
  const shown = element("p", "snippet"), { snippet_span: span, snippet_marks: marks } = hit.about;
  shown.dir = "auto";
  fill(shown, flowing(hit.snippet), marks ?? hit.highlights, hit.near);
  if (span?.[0] > 0) shown.prepend("… ");
  if (span?.[1] < Array.from(hit.text.trimEnd()).length) shown.append(" …");
  return shown;
}

function passageOf(hit) {
  // The whole passage with its marks, where it is, and the documents that have the same text.
  const shown = element("div", "whole"), text = element("p", "snippet");
  text.dir = "auto";
  text.tabIndex = 0;
  fill(text, hit.text, hit.about.marks ?? []);
  shown.append(text);
  const place = hit.path && (hit.start_line > 0 ? `${hit.path}:${hit.start_line}-${hit.end_line}` : pageOf(hit));
  if (place && navigator.clipboard) {
    const copy = element("button", "copy", `Copy ${place}`);
    copy.type = "button";
    copy.addEventListener("click", () => navigator.clipboard.writeText(place).then(() => { copy.textContent = "Copied"; }));
    shown.append(copy);
  }
  return shown;
}

function sameOf(hit) {
  // "+4 documents with the same text", which opens to their places; null if there are none.
  const same = hit.about.same ?? [];
  if (!same.length) return null;
  const made = element("details", "same");
  made.append(element("summary", "", `+${plural(same.length, "document")} with the same text`));
  for (const one of same) made.append(element("p", "place", one.path ? one.path + (one.start_line > 0 ? `:${one.start_line}` : "") : one.document));
  return made;
}

export function sentencesOf(hit) {
  const found = [];
  let start = 0;
  for (const { segment } of new Intl.Segmenter("en", { granularity: "sentence" }).segment(flowing(hit.snippet))) {
    const end = start + Array.from(segment).length;
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

const placeOf = (hit) => (hit.path ? (hit.snippet_line > 0 ? `${hit.path}:${hit.snippet_line}` : pageOf(hit)) : hit.title && hit.id);

function item(row, name) {
  // One row of a list; its title opens and closes the passage.
  const { hit, rank } = row;
  const made = element("li", `${row.change === "gone" ? "gone" : ""}${hit.about.weak ? " weak" : ""}`.trim()), body = element("div"), top = element("div", "top");
  const place = placeOf(hit);
  const title = element("button", "title", hit.title && hit.title !== hit.path ? hit.title : place || hit.id);
  title.type = "button";
  title.dir = "auto";
  title.setAttribute("aria-expanded", "false");
  top.append(title);
  const moved = movement(row);
  if (moved) top.append(moved);
  if (hit.about.weak) top.append(element("span", "tag", "weak match"));
  let passage = snippetOf(hit);
  passage.id = name;
  const swap = (next) => {
    next.id = name;
    passage.replaceWith(next);
    passage = next;
  };
  const isOpen = () => title.getAttribute("aria-expanded") === "true";
  hit.redraw = () => isOpen() || swap(snippetOf(hit));
  title.setAttribute("aria-controls", name);
  title.addEventListener("click", () => {
    title.setAttribute("aria-expanded", String(!isOpen()));
    swap(isOpen() ? passageOf(hit) : snippetOf(hit));
  });
  body.append(top);
  if (place && place !== title.textContent) body.append(element("p", "place", place));
  body.append(why(hit), passage);
  const same = sameOf(hit);
  if (same) body.append(same);
  made.append(element("span", "rank", rank === null ? "" : `${rank}.`), body);
  return made;
}

export function showRows(list, rows) {
  list.replaceChildren(...rows.map((row, i) => item(row, `${list.id}-passage-${i}`)));
  if (!rows.length) list.append(element("li", "none", "Nothing was found."));
}

export const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

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
