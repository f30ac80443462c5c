"""Pages of MLflow and Prefect as a person with a browser sees them."""

import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

_CHROMIUM, _DRIVER = "chromium", "chromedriver"
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # for root in containers, where Chromium starts in no other way; all it opens is our own
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
_WAIT_SECONDS = 60.0
_COLUMNS = ("attributes.`Dataset`", "params.`method`", "params.`kappa`", "params.`seed`", "metrics.`mismatch/kl_k3`")
_WITHOUT_OVERLAYS = ".modebar, [data-assistant-ui] { display: none !important }"


@dataclass(frozen=True)
class Shown:
    """What there is to look at."""

    mlflow: str
    prefect: str
    home: Path


class Browser:
    """A window on the two servers, with preferences that a user would have clicked together."""

    def __init__(self, driver: webdriver.Chrome, shown: Shown, screenshots: Path | None):
        self._driver, self._screenshots = driver, screenshots
        self.shown = shown

    def prefer(self, experiment: str) -> None:
        """Have MLflow show training runs with the columns that tell methods apart, and Prefect in light colours."""
        state = {"selectedColumns": _COLUMNS, "orderByKey": "attributes.start_time", "orderByAsc": False}
        state |= {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "searchFilter": ""}
        kept = {
            "mlflow.workflowType_v1": '"machine_learning"',
            "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
            "mlflow.assistant.panelOpen_v1": "false",
            f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState': json.dumps(state),
            "color-scheme": '"light"',
        }
        source = f"for (const [key, value] of Object.entries({json.dumps(kept)})) localStorage.setItem(key, value)"
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})

    def open(self, address: str, *awaited: str, width: int = 1400, height: int = 860) -> str:
        """Open a page, wait until it shows each of the texts, and return all that it shows."""
        self._driver.set_window_size(width, height)
        self._driver.get("about:blank")
        self._driver.get(address)
        return self.wait_for(*awaited)

    def wait_for(self, *awaited: str) -> str:
        """Wait until the page shows each of the texts, and return all that it shows."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while missing := [text for text in awaited if text not in self._text()]:
            assert time.monotonic() < deadline, f"{missing} not among what the page shows:\n{self._text()}"
            time.sleep(0.3)
        return self._text()

    def click(self, text: str) -> None:
        """Click on what bears this text."""
        bears = f"normalize-space(.)={json.dumps(text)}"
        found = self._driver.find_elements(By.XPATH, f"//*[{bears} and not(*[{bears}])]")
        next(element for element in found if element.is_displayed()).click()

    def choose(self, number: int, *texts: str) -> None:
        """Choose these in the page's list of that number, each by writing its name."""
        field = self._driver.find_elements(By.CSS_SELECTOR, "[class$='select-selector']")[number]
        ActionChains(self._driver).click(field).perform()
        for text in texts:
            # The list follows what is written.
            ActionChains(self._driver).send_keys(text).pause(0.5).send_keys(Keys.ENTER).pause(0.5).perform()
        ActionChains(self._driver).send_keys(Keys.ESCAPE).perform()

    def target(self, text: str) -> str:
        """Where the link of this text leads."""
        return self._driver.find_element(By.LINK_TEXT, text).get_attribute("href") or ""

    def fill(self, placeholder: str, text: str) -> None:
        """Write into the field with this placeholder."""
        self._driver.find_element(By.CSS_SELECTOR, f"input[placeholder={json.dumps(placeholder)}]").send_keys(text)

    def screenshot(self, name: str) -> None:
        """Keep what is to be seen, where screenshots are wanted, in 128 colours."""
        self._driver.execute_script(
            "const style = document.createElement('style'); style.textContent = arguments[0];"
            "document.head.appendChild(style)",
            _WITHOUT_OVERLAYS,
        )
        # Charts and graphs are moved into place.
        time.sleep(3)
        if self._screenshots is not None:
            picture = Image.open(io.BytesIO(self._driver.get_screenshot_as_png())).convert("RGB")
            self._screenshots.mkdir(parents=True, exist_ok=True)
            picture.quantize(128, dither=Image.Dither.NONE).save(self._screenshots / f"{name}.png", optimize=True)

    def _text(self) -> str:
        # Not by element: pages render themselves anew all the time.
        return self._driver.execute_script("return document.body.innerText")


@contextmanager
def open_browser(shown: Shown, screenshots: Path | None) -> Iterator[Browser]:
    """A Chromium under its driver, both of the system: nothing is downloaded."""
    chromium, driver = shutil.which(_CHROMIUM), shutil.which(_DRIVER)
    assert chromium, f"{_CHROMIUM} is not on the PATH; Debian and Ubuntu have it as package chromium"
    assert driver, f"{_DRIVER} is not on the PATH; Debian and Ubuntu have it as package chromium-driver"
    options: Any = Options()
    options.binary_location = chromium
    for option in _OPTIONS:
        options.add_argument(option)
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(window, shown, screenshots)
    finally:
        window.quit()
