// Before anything is drawn: the colors that the reader chose, if any.
try {
  const theme = window.localStorage.getItem("theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch { /* storage is disabled */ }
