"""What is too wide on built pages, at the widths of a desk, a half window and a telephone: `python -m tests.widths build/docs`.

A headless Chromium loads each page once, in a frame that takes each width in turn. Printed are elements wider than their box,
by what a reader sees: `page` (the whole page scrolls sideways), `scrolls` (a table, code or equation scrolls by itself),
`clipped` (what is beyond the edge cannot be reached). Exits with 1 where a page scrolls or is clipped at any width, or code
scrolls at the widest.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WIDTHS = (1440, 1000, 400)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# `clientWidth` of an inline element is 0; what the theme hides for screen readers has an absolute place.
LOOK = """<!doctype html><body style="margin:0"><iframe style="border:0;height:900px"></iframe><script>
const [frame] = document.getElementsByTagName("iframe");
const words = e => [...(e.innerText || e.alt || "").trim().replace(/\\s+/g, " ")].slice(0, 60).join("");
function look(page, width) {
  const doc = frame.contentDocument, view = frame.contentWindow, root = doc.scrollingElement, found = [];
  const add = (how, e) => found.push({page, width, how, tag: e.tagName.toLowerCase(), is: e.scrollWidth, has: e.clientWidth, words: words(e)});
  if (root.scrollWidth > width) add("page", doc.documentElement);
  for (const e of (doc.querySelector("article") || doc.body).querySelectorAll("*")) {
    if (!e.clientWidth || e.scrollWidth <= e.clientWidth + 1) continue;
    const style = view.getComputedStyle(e), how = style.overflowX;
    if (how == "auto" || how == "scroll") add("scrolls", e);
    else if (how != "visible" && style.position != "absolute") add("clipped", e);
  }
  return found;
}
const settled = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)));
(async () => {
  const found = [];
  for (const page of PAGES) {
    await new Promise(done => { frame.onload = done; frame.src = page; });
    for (const width of WIDTHS) { frame.style.width = width + "px"; await settled(); found.push(...look(page, width)); }
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


def overflowing(build: Path, pages: list[str] | None = None, widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
    """Elements that are wider than their box: {page, width, how, tag, is, has, words}, widths in CSS pixels.

    Raises `SystemExit` without a Chromium, `TimeoutError` where it does not answer in ten minutes.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser; expected one of {', '.join(BROWSERS)} on PATH")
    pages = pages or sorted(path.relative_to(build).as_posix() for path in build.rglob("*.html"))
    told, found = threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/look":
                return super().do_GET()
            page = LOOK.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(widths)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self):
            found.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            told.set()

        def log_message(self, format, *args):
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(build))) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1600,1000"]
        address = f"http://127.0.0.1:{server.server_port}/look"
        # A port of its own keeps a headless Chromium alive; without one it prints the page and leaves.
        chromium = subprocess.Popen(
            [browser, *flags, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if not told.wait(600):
                raise TimeoutError(f"{browser} gave no widths of {len(pages)} pages in 600 s")
        finally:
            chromium.terminate()
            chromium.wait()
            server.shutdown()
    return found


def wrong(line: dict[str, Any]) -> bool:
    """Whether a reader is kept from something, and not only asked to scroll a wide table."""
    return line["how"] != "scrolls" or (line["tag"] == "pre" and line["width"] == max(WIDTHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build", type=Path, help="folder of built pages")
    parser.add_argument("pages", nargs="*", help="of these pages only, such as engine.html")
    args = parser.parse_args()
    found = overflowing(args.build, args.pages)
    for line in found:
        print("{width:>5} {how:<7} {page}  <{tag}> {is} > {has}  {words}".format(**line))
    for width in WIDTHS:
        here = [line for line in found if line["width"] == width]
        print(
            f"{width} px: {sum(line['how'] == 'page' for line in here)} pages scroll, "
            f"{sum(line['how'] == 'clipped' for line in here)} elements are clipped, "
            + ", ".join(
                f"{sum(line['how'] == 'scrolls' and line['tag'] == tag for line in here)} {name} scroll"
                for tag, name in (("pre", "code blocks"), ("table", "tables"), ("div", "other boxes"))
            )
        )
    raise SystemExit(any(map(wrong, found)))


if __name__ == "__main__":
    main()
