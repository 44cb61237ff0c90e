"""Fixtures for tests of training runs."""

import os
import signal

import pytest

import engine.training.loop


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(n)`: send this process a SIGTERM in the middle of its n-th step from now."""

    def arm(n: int) -> None:
        left, clip_gradients = [n], engine.training.loop.clip_gradients

        def counted(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return clip_gradients(*args)

        monkeypatch.setattr(engine.training.loop, "clip_gradients", counted)

    return arm
