"""`prepare`: class statistics and error predictor from labelled images."""
