"""Does reasoning help: controls, costs and significance on one data set."""
