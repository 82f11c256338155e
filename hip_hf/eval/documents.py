"""Documents with hidden facts, and the questions about them: what the demo, pass-key test and training share."""

NAMES = [
    "amber", "anchor", "apple", "arrow", "badger", "banjo", "basil", "beacon", "birch", "bison", "bronze", "cactus",
    "camel", "canyon", "cedar", "cobalt", "comet", "copper", "coral", "cricket", "dragon", "ember", "falcon", "fern",
    "fiddle", "ginger", "glacier", "granite", "harbor", "hazel", "heron", "indigo", "iris", "ivory", "jade", "jasper",
    "kettle", "lantern", "lemon", "lotus", "magnet", "maple", "marble", "meteor", "mint", "nickel", "olive", "onyx",
    "orchid", "otter", "panda", "pearl", "pepper", "pigeon", "quartz", "raven", "saffron", "salmon", "tiger", "topaz",
    "tulip", "velvet", "walnut", "zebra",
]  # fmt: skip


def note(name: str, key: str) -> str:
    """The sentence that hides a fact."""
    return f"\nThe pass key of {name} is {key}. Remember it.\n"


def question(name: str) -> str:
    """The question, up to where the answer begins."""
    return f"\nWhat is the pass key of {name}? The pass key of {name} is"
