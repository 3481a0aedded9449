"""What a third party ships: strategies, found through the entry points in the folder beside this file."""

from heedful import AttentionStrategy


class DoublingStrategy(AttentionStrategy):
    """Twice the value of the one key there is."""

    name = "doubling"
    aliases = ("twofold",)

    def compute_attention(self, query, key, value, **kwargs):
        """See the base class."""
        return (2 * value).expand_as(query)


class NamelessStrategy(AttentionStrategy):
    """Has no name of its own: its entry point gives it one."""

    def compute_attention(self, query, key, value, **kwargs):
        """See the base class."""
        return value.expand_as(query)


class ImpostorStrategy(DoublingStrategy):
    """Wants the name of one of heedful's own strategies."""

    name = "native"
    aliases = ()


def no_strategy():
    """Is a function."""
