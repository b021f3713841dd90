// Lists of hits: why each stands where it does, and what reasoning changed.
// Text from the server or the index is only ever set as textContent.

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const plural = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;

// ----------------------------------------------------------------------------------------------- what reasoning changed

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
  // What reasoning changed in the list, in one line.
  const rows = merged(off, on);
  const count = (change) => rows.filter((row) => row.change === change).length;
  const [fresh, gone, moved] = [count("new"), count("gone"), count("up") + count("down")];
  if (!fresh && !gone && !moved) return on.length ? `Reasoning changed nothing in the first ${on.length}.` : "";
  const parts = [[fresh, "new"], [gone, "gone"], [moved, "moved"]].filter(([n]) => n).map(([n, what]) => `${n} ${what}`);
  const first = off[0]?.id === on[0]?.id ? "the first place kept" : "another first place";
  return `Reasoning: ${[...parts, first].join(", ")}.`;
}

function movement({ change, rank, was }) {
  if (!change) return null;
  const text = { new: "new with reasoning", up: `▲ from ${was}`, down: `▼ from ${was}`, gone: `gone, was ${was}` }[change];
  const made = element("span", `moved ${change}`, text);
  made.dataset.rank = String(rank ?? "");
  return made;
}

// ------------------------------------------------------------------------------------------------------- why it is here

function why(hit) {
  // The hit's rank and score in each list that has it, in words; the fused score only as a tooltip.
  const line = element("p", "why");
  const { ranks, scores } = hit;
  if (ranks.vector) line.append(element("span", "by meaning", `meaning #${ranks.vector} · cosine ${scores.vector.toFixed(2)}`));
  if (ranks.text) line.append(element("span", "by words", `words #${ranks.text} · ${scores.text.toFixed(1)}`));
  line.title = `score ${hit.score.toFixed(4)}`;
  return line;
}

function highlighted(hit) {
  // The snippet with its highlights. Positions count code points, JavaScript strings count UTF-16 units.
  const shown = element("p", "snippet");
  shown.dir = "auto";
  const start = hit.text.indexOf(hit.snippet);
  if (start > 0) shown.append("… ");
  const points = Array.from(hit.snippet);
  let at = 0;
  for (const [begin, end] of hit.highlights) {
    if (begin < at) continue;
    shown.append(points.slice(at, begin).join(""), element("mark", "", points.slice(begin, end).join("")));
    at = end;
  }
  shown.append(points.slice(at).join(""));
  if (start >= 0 && start + hit.snippet.length < hit.text.trimEnd().length) shown.append(" …");
  return shown;
}

const placeOf = (hit) => (hit.path ? (hit.snippet_line > 0 ? `${hit.path}:${hit.snippet_line}` : hit.path) : hit.title && hit.id);

function item(row, name) {
  // One row of a list; its title opens and closes the passage.
  const { hit, rank } = row;
  const made = element("li", row.change === "gone" ? "gone" : ""), body = element("div"), top = element("div", "top");
  const place = placeOf(hit);
  const title = element("button", "title", hit.title && hit.title !== hit.path ? hit.title : place || hit.id);
  title.type = "button";
  title.dir = "auto";
  title.setAttribute("aria-expanded", "false");
  top.append(title);
  const moved = movement(row);
  if (moved) top.append(moved);
  let passage = highlighted(hit);
  passage.id = name;
  title.setAttribute("aria-controls", name);
  title.addEventListener("click", () => {
    const open = title.getAttribute("aria-expanded") === "false";
    const next = open ? element("p", "snippet whole", hit.text) : highlighted(hit);
    next.id = name;
    next.dir = "auto";
    if (open) next.tabIndex = 0;
    passage.replaceWith(next);
    passage = next;
    title.setAttribute("aria-expanded", String(open));
  });
  body.append(top);
  if (place && place !== title.textContent) body.append(element("p", "place", place));
  body.append(why(hit), passage);
  made.append(element("span", "rank", rank === null ? "" : `${rank}.`), body);
  return made;
}

export function showRows(list, rows) {
  // Replace the items of the <ol> `list`.
  list.replaceChildren(...rows.map((row, i) => item(row, `${list.id}-passage-${i}`)));
  if (!rows.length) list.append(element("li", "none", "Nothing was found."));
}

// ------------------------------------------------------------------------------------------------------------- figures

export const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

export function figures({ timings, usage, reasoning }) {
  // Times and tokens of one search.
  const { reason_ms: model, search_ms: index } = timings;
  const written = reasoning ? `, ${usage.completion_tokens} written` : "";
  return `${milliseconds(model + index)} (model ${milliseconds(model)}, index ${milliseconds(index)}) · ${usage.prompt_tokens} tokens read${written}`;
}

export function sizes({ name, documents, chunks, created }) {
  // What is indexed, in one line.
  const day = created && new Date(created).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" });
  const parts = [documents !== null && plural(documents, "document"), plural(chunks, "passage")].filter(Boolean);
  return `${name}: ${parts.join(" in ")}${day ? `, indexed since ${day}` : ""}.`;
}
