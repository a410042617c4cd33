"""Training code that the user has: tuned as it is, by what it calls at run time."""
