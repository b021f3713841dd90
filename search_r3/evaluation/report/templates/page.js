(function () {
  var root = document.documentElement, button = document.getElementById("theme"), key = "search-r3-report-theme";
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function stored() { try { return localStorage.getItem(key); } catch (e) { return null; } }
  function shown() { return root.dataset.theme || (dark.matches ? "dark" : "light"); }
  function say() { button.textContent = shown() === "dark" ? "Light colors" : "Dark colors"; }
  var before = stored();
  if (before === "light" || before === "dark") root.dataset.theme = before;
  button.hidden = false;
  say();
  dark.addEventListener("change", say);
  button.addEventListener("click", function () {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    try { localStorage.setItem(key, root.dataset.theme); } catch (e) { /* private windows keep nothing */ }
    say();
  });
  function unfold() {
    var target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    var inner = target && target.querySelector("details.section");
    if (inner) inner.open = true;
    for (var at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  }
  window.addEventListener("hashchange", unfold);
  document.addEventListener("click", function (event) {
    if (event.target.closest && event.target.closest("nav a")) setTimeout(unfold); // also where the address stays
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (one) { one.open = true; });
  });
  var links = {}, seen = new Set();
  document.querySelectorAll("nav a").forEach(function (one) { links[one.hash.slice(1)] = one; });
  function here() {
    var current = null;
    document.querySelectorAll("main > section").forEach(function (one) {
      if (links[one.id]) links[one.id].removeAttribute("aria-current");
      if (!current && seen.has(one)) current = one;
    });
    if (current && links[current.id]) links[current.id].setAttribute("aria-current", "true");
  }
  if ("IntersectionObserver" in window) {
    var observer = new IntersectionObserver(function (changes) {
      changes.forEach(function (one) { if (one.isIntersecting) seen.add(one.target); else seen.delete(one.target); });
      here();
    }, { rootMargin: "-15% 0px -60% 0px" });
    document.querySelectorAll("main > section").forEach(function (one) { observer.observe(one); });
  }
  unfold();
})();
