"""Where workers live: in this process, or on Ray. One contract, `engine.executors.base`."""
