"""Where workers live: in this process, or on Ray. One contract, `engine.driver.executors.base`."""
