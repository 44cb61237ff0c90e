"""Use the demo page in headless Chromium and save a screenshot.

    python docs/demo_screenshot.py CHECKPOINT IMAGE QUESTION SCREENSHOT.png

Starts demo.py, uploads the image, asks, waits for the answer, moves the token slider, saves the
screenshot and prints the answer. Needs Debian's chromium and chromium-driver, and selenium.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def serving(checkpoint: str, *flags: str, **env: str) -> Iterator[tuple[str, int]]:
    """Run demo.py; gives its address and process id."""
    argv = [sys.executable, "-u", str(ROOT / "demo.py"), checkpoint, "--port", "0", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    server = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, cwd=ROOT)  # fmt: skip
    output = ""
    try:
        for line in server.stdout:
            output += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0], server.pid
                return
        raise RuntimeError(f"demo.py ended: {output}")
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


@contextlib.contextmanager
def browser() -> Iterator:
    """Headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--no-proxy-server", "--disable-gpu",
                 "--disable-dev-shm-usage", "--window-size=1320,1065",
                 "--hide-scrollbars"):  # fmt: skip
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(what: str, check, seconds: float = 180):
    """Return the first true result of `check()`; raises RuntimeError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # an element may be redrawn at this moment
            if found := check():
                return found
        time.sleep(0.2)
    raise RuntimeError(f"waited {seconds} s for {what}")


def ask(driver, address: str, image: Path, question: str, screenshot: Path) -> str:
    """Ask on the page and return the answer; raises RuntimeError if a part does not respond."""
    from selenium.webdriver.common.by import By

    find = lambda css: driver.find_element(By.CSS_SELECTOR, css)  # noqa: E731
    driver.get(address)
    upload = wait_for("the page", lambda: find("#files input[type=file]"))
    upload.send_keys(str(image.resolve()))
    wait_for("the upload", lambda: image.stem[:4] in find("#files").text)
    box = find("#prompt textarea, #prompt input")
    box.clear()
    box.send_keys(question)
    find("#ask").click()
    note = wait_for("the note", lambda: find("#note textarea, #note input").get_attribute("value"))
    if "answer tokens" not in note:
        raise RuntimeError(note)
    for part in ("#tiles img", "#heat img"):
        wait_for(part, lambda part=part: int(find(part).get_property("naturalWidth")) > 0)
    first = find("#line").text
    slider = find("#token input[type=number]")
    slider.clear()
    slider.send_keys("2\n")
    find("#line").click()
    wait_for("the second token", lambda: "Token 2" in find("#line").text)
    if first == find("#line").text:
        raise RuntimeError("the token slider has no effect")
    time.sleep(1)
    driver.save_screenshot(str(screenshot))
    return find("#answer textarea").get_attribute("value")


def main(checkpoint: str, image: str, question: str, screenshot: str) -> None:
    with serving(checkpoint) as (address, _), browser() as driver:
        print(ask(driver, address, Path(image), question, Path(screenshot)))


if __name__ == "__main__":
    main(*sys.argv[1:])
