"""Executors run workers: in this process, or on Ray. `engine.driver.executors.base` is their interface."""
