"""The mathematics: scores, sampling, guidance, class statistics. Pure torch; specifications without torch."""
