"""Types that no run of these tests trusts."""


class Stranger:
    """A class of a package that is not the learner's."""


class StrangeError(Exception):
    """An exception of a package that is not the learner's."""
