"""A real headless Chromium, or a skip that says why there is none."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
VISIBLE_BUTTON = """
const named = [...document.querySelectorAll('button, [role=button]')].filter(one => one.checkVisibility({
  visibilityProperty: true }) && (one.getAttribute('aria-label') ?? one.innerText).trim() === arguments[0]);
return named.at(-1)"""


class Browser:
    """The chat page in a browser, in the words of its tests."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait(lambda: self.all("#model option"))

    def visit(self, url: str) -> None:
        """The page as at a first visit."""
        self.driver.get(url)
        self.js("localStorage.clear()")
        self.open(url)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what was logged before counts for nobody

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(command, arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> list[str]:
        """What every match says, read at one moment."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector)

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: condition())

    def press(self, name: str) -> None:
        """Click the last visible button of this name."""
        cast(WebElement, self.wait(lambda: self.js(VISIBLE_BUTTON, name))).click()

    def keys(self, *keys: str) -> None:
        """Typed where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, text: str) -> None:
        self.one("#text").send_keys(text, Keys.ENTER)

    def answered(self) -> str:
        """The last answer, once it has ended."""
        self.wait(lambda: self.all(".turn.model:last-child .foot *") and not self.all(".live"))
        return self.text(".turn.model:last-child .body")[0]

    def set(self, **values: object) -> None:
        """Settings, by the names that requests have for them."""
        self.press("Settings")
        for name, value in values.items():
            self.js("arguments[0].value = ''", self.one(f"#{name}"))
            self.one(f"#{name}").send_keys(str(value))
        self.press("Done")

    def choose(self, model: str) -> None:
        self.one(f"#model option[value='{model}']").click()

    @contextmanager
    def phone(self) -> Iterator[None]:
        self.cdp("Emulation.setDeviceMetricsOverride", **PHONE)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
        try:
            yield
        finally:
            self.cdp("Emulation.setTouchEmulationEnabled", enabled=False)
            self.cdp("Emulation.clearDeviceMetricsOverride")

    @contextmanager
    def media(self, **features: str) -> Iterator[None]:
        """A user whose system asks for these: `prefers_color_scheme="dark"`."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=wanted)
        try:
            yield
        finally:
            self.cdp("Emulation.setEmulatedMedia", features=[])

    def complaints(self) -> list[str]:
        """What the page logged as an error since the last call."""
        entries = cast(list[dict[str, str]], self.driver.get_log("browser"))
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Every address that the browser asked since the last call."""
        entries = cast(list[dict[str, str]], self.driver.get_log("performance"))
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def downloaded(self) -> Path:
        """The one file that was saved."""
        return self.wait(lambda: next(self.downloads.glob("*.json"), None))


@contextmanager
def headless_chromium() -> Iterator[Browser]:
    """A browser with a profile of its own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs chromium and chromedriver on the PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
        downloads = Path(profile, "saved")
        downloads.mkdir()
        try:
            browser = Browser(driver, downloads)
            browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
            yield browser
        finally:
            driver.quit()
