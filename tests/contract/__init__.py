"""One suite for the semantics that every mode shares; it runs over each of them."""
