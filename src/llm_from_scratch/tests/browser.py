"""A headless browser, and a server for it to look at."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900"
)


class Browser:
    """Chromium under selenium, with the few gestures that the tests of the page make."""

    def __init__(self, profile: Path):
        """profile: an empty folder. Skips the test if there is no browser."""
        pytest.importorskip("selenium")
        if CHROMIUM is None or DRIVER is None:
            pytest.skip("needs chromium and chromedriver")
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.js: Callable[..., Any] = self.driver.execute_script

    def open(self, url: str) -> None:
        """Loads a page without stored state."""
        self.driver.get("about:blank")  # else another fragment would not load the page again
        origin = "/".join(url.split("/")[:3])
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        self.driver.get(url)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """The first truthy value of condition(); what a page replaces meanwhile is looked for again."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, seconds, 0.02, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def write(self, selector: str, text: str) -> None:
        """Types over what stands in a field."""
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, text)

    def press(self, *keys: str) -> None:
        """Keys by their names in selenium, to what has the focus."""
        from selenium.webdriver.common.keys import Keys

        self.driver.switch_to.active_element.send_keys(*(getattr(Keys, key, key) for key in keys))

    def focused(self) -> str:
        """The id of what has the focus, or its text."""
        return self.js("const e = document.activeElement; return e.id || e.textContent")

    def window(self, width: int, height: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def console(self) -> list[str]:
        """What has gone wrong since the last call. That an answer was an error is logged by the browser itself."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING") and e["source"] != "network"]

    def close(self) -> None:
        self.driver.quit()


class Site:
    """An ASGI app on a free port of 127.0.0.1, in a thread."""

    def __init__(self, app: Any):
        import uvicorn

        listening = socket.create_server(("127.0.0.1", 0))  # what comes before uvicorn is up waits here
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
