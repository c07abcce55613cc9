"""Small learners as users write them, each run undisturbed and disturbed, and what comes of each."""
