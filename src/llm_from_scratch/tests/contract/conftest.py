"""Fixtures of the tests of the page."""

from ..playground import browser_fixture, chromium_fixture, run_dir_fixture, site_fixture  # noqa: F401
