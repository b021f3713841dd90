"""Studies of whether reasoning helps: controls, costs and significance on one data set."""
