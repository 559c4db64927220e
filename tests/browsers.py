"""A real Chromium, which reaches nothing but this machine."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.conftest import wait_until

DESKTOP = (1600, 900)
PHONE = (390, 844)

OPTIONS = (
    "--headless=new",
    # Chromium may not use it in most containers.
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--metrics-recording-only",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)

# A phone shows a page that is too wide smaller, and says that it fits into the window.
IS_TOO_WIDE = "return document.scrollingElement.scrollWidth > document.scrollingElement.clientWidth"

# Of each text that is seen: by WCAG, the contrast of its colour with the nearest background that is one.
CONTRASTS = """
const parsed = text => text.match(/[0-9.]+/g).map(Number);
const light = ([red, green, blue]) => {
    const [r, g, b] = [red, green, blue].map(
        one => one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4
    );
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = element => {
    for (let one = element; one; one = one.parentElement) {
        const colour = parsed(getComputedStyle(one).backgroundColor);
        if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
};
const found = [];
const texts = document.createTreeWalker(document.querySelector(arguments[0]), NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement && style.fill !== 'none' ? style.fill : style.color;
    const [a, b] = [light(parsed(ink)), light(background(element))].sort((a, b) => b - a);
    found.push([text, (a + 0.05) / (b + 0.05)]);
}
return found;
"""


def programs() -> tuple[str, str] | None:
    """Chromium and its driver; ``None`` where one of them is missing."""
    driver = shutil.which("chromedriver")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if driver and (browser := shutil.which(name)):
            return browser, driver
    return None


class Browser:
    """A window of Chromium, on pages below its ``url``."""

    def __init__(self, driver: Chrome, screenshots: Path) -> None:
        self.driver = driver
        self.url = ""
        self._screenshots = screenshots

    def shows(self, size: tuple[int, int] = DESKTOP, *, dark: bool = False, scripts: bool = True) -> None:
        """How the next pages are shown: on a phone if it is as large as one; for a dark room."""
        width, height = size
        self._tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", features=[scheme])
        self._tell("Emulation.setScriptExecutionDisabled", value=not scripts)

    def forgets(self) -> None:
        """Whoever was logged in no longer is."""
        self._tell("Network.clearBrowserCookies")

    def goes(self, path: str) -> None:
        self.driver.get(self.url + path)

    @property
    def text(self) -> str:
        """What a person reads on the page."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    def finds(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def types(self, selector: str, text: str) -> None:
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(text)

    def clicks(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def leaves_by(self, selector: str) -> None:
        """Click what leads to another page, and return when that has come."""
        self.driver.execute_script("window.isLeft = true")
        self.clicks(selector)
        wait_until(self._has_come, f"{selector} leads to another page")

    def _has_come(self) -> bool:
        try:
            return bool(
                self.driver.execute_script("return !window.isLeft && document.readyState === 'complete'")
            )
        except WebDriverException:
            # Between two pages there is none to ask.
            return False

    def is_too_wide(self) -> bool:
        """Whether the page itself has to be moved to the side; what scrolls within it does not count."""
        return bool(self.driver.execute_script(IS_TOO_WIDE))

    def hides_a_part_of(self, selector: str) -> bool:
        """Whether one of these elements has to be moved to the side to be seen in full."""
        return any(
            one.get_property("scrollWidth") > one.get_property("clientWidth") for one in self.finds(selector)
        )

    def contrasts(self, selector: str) -> list[tuple[str, float]]:
        """All texts in an element with their contrasts, from 1 for what cannot be read to 21."""
        return [(text, contrast) for text, contrast in self.driver.execute_script(CONTRASTS, selector)]

    def errors(self) -> list[str]:
        """What scripts and requests complained of since it was asked for last."""
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        # Which Chromium asks for by itself.
        return [message for message in found if "/favicon.ico" not in message]

    def takes_picture(self, name: str) -> Path:
        """A screenshot of the whole page."""
        size = self._tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self._tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file = self._screenshots / f"{name}.png"
        file.write_bytes(base64.b64decode(taken["data"]))
        return file

    def _tell(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)


@contextmanager
def browser(screenshots: Path) -> Iterator[Browser]:
    """A new browser, which knows nothing, and puts its screenshots into this folder."""
    found = programs()
    assert found, "chromium is not installed: apt-get install chromium chromium-driver"
    options = ChromeOptions()
    options.binary_location, driver = found
    options.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
    for option in OPTIONS:
        options.add_argument(option)
    if os.geteuid() == 0:
        # Its sandbox refuses to work for root.
        options.add_argument("--no-sandbox")
    with tempfile.TemporaryDirectory(prefix="pglock-chromium-", ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        window = Chrome(options=options, service=Service(driver))
        try:
            yield Browser(window, screenshots)
        finally:
            window.quit()
