"""Makes the pictures of the playground from a run: playground.png and playground-watch.png, next to this file.

    .venv/bin/python assets/page.py RUN

RUN is the folder of a run with samples: llm-train quick --sample_interval=100 --start=ROMEO: --out_dir=RUN. Needs the
extra dev, chromium and chromedriver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image

from llm_from_scratch.tests.browser import Browser

HERE = Path(__file__).resolve().parent
SETTINGS = {"prompt": "ROMEO:", "max_tokens": 120, "n": 2, "seed": 11}  # within the context of 128
# Tokens that were not likely: their alternatives are of interest.
UNLIKELY = "#samples article:first-child .line:nth-child(2) .t:is(.level-2, .level-3, .level-4)"


def shoot(browser: Browser, name: str, height: int) -> None:
    browser.window(1200, height)
    time.sleep(1)  # the chart is drawn again
    browser.driver.save_screenshot(str(HERE / name))
    Image.open(HERE / name).convert("RGB").quantize(160).save(HERE / name, optimize=True)


def main(run: str) -> None:
    command = [sys.executable, "-m", "llm_from_scratch.cli.serve", f"--out_dir={run}", "--port=0", "--device=cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        url = next(line.split(" at ")[1].split()[0] for line in server.stdout if " at http://" in line)
        with tempfile.TemporaryDirectory() as profile:
            browser = Browser(Path(profile))
            browser.window(1200, 1000)
            browser.open(f"{url}/#{urlencode(SETTINGS)}")
            browser.wait(lambda: browser.find("#model").text, 60)
            browser.click("#generate")
            browser.wait(lambda: browser.find("#regenerate").is_enabled(), 300)
            browser.wait(lambda: browser.all(UNLIKELY))[3].click()
            browser.wait(lambda: browser.find("#alternatives").is_displayed())
            shoot(browser, "playground.png", 1000)
            browser.press("ESCAPE")
            browser.click("#tab-watch")
            browser.wait(lambda: browser.find("#written").is_displayed(), 60)
            browser.click("#log-x")
            browser.js("const s = document.getElementById('slider'); s.value = 3; s.dispatchEvent(new Event('input'))")
            shoot(browser, "playground-watch.png", 1190)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
