"""`riskforge study transfer`: do failures of one classifier carry over to others, and across data sets?"""
