"""Pages in headless Chromium: what a script sees in one, what the page asks for, and what the console says."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading

import pytest

from tests import PATIENCE

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `apt-get install chromium` brings one")

DRIVER = """<!doctype html><body><iframe src="PAGE" width="WIDTH" height="900"></iframe><script>
document.querySelector("iframe").onload = async (event) => {
  const { contentWindow: view, contentDocument: page } = event.target;
  const pause = (time) => new Promise((done) => setTimeout(done, time ?? 20));
  const waiting = async (fits) => { for (let i = 0; i < 3000 && !fits(); i++) await pause(); return fits(); };
  const seen = {};
  try { SCRIPT } catch (error) { seen.error = String(error.stack); }
  seen.requests = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  await fetch("SEEN", { method: "POST", mode: "no-cors", body: JSON.stringify(seen) });
};
</script>"""


def in_browser(folder, profile, script, page="page.html", as_file=False, width=1300):
    """Runs a script beside a page of a folder, shown in a frame, in Chromium. Returns what it sees, and the files asked for.

    The script sends what it saw: --dump-dom and --screenshot would load every image, lazy or not. "console" has what the page
    wrote to the console from its first line on, errors that nobody caught and refused requests included; "requests" what the
    page asked for beside itself. With `as_file` it is opened from the disk, without a server. `width`: of the frame.
    """
    asked, found = set(), queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            asked.add(self.path.rpartition("/")[2])

    # The sandbox needs privileges that containers lack, and /dev/shm is small there.
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "--enable-logging=stderr"]
    handler = functools.partial(Handler, directory=str(folder))
    log = profile / "chromium.log"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, log.open("w") as errors:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server_address = f"http://127.0.0.1:{server.server_port}"
        text = DRIVER.replace("PAGE", page).replace("SEEN", f"{server_address}/seen")
        text = text.replace("WIDTH", str(width)).replace("SCRIPT", script)
        (folder / "driver.html").write_text(text)
        address = f"{server_address}/driver.html"
        if as_file:
            command.append("--allow-file-access-from-files")  # the driver looks into the page
            address = (folder / "driver.html").as_uri()
        with subprocess.Popen([*command, address], stdout=subprocess.DEVNULL, stderr=errors) as chromium:
            try:
                seen = found.get(timeout=PATIENCE)
            finally:
                chromium.terminate()
                server.shutdown()
    seen["console"] = re.findall(r":CONSOLE[^\]]*\] (.*)", log.read_text(errors="replace"))
    return seen, asked
