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
    for (var at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  }
  window.addEventListener("hashchange", unfold);
  unfold();
})();
