"""An entry point may name a module: the strategies that it defines itself are found."""

from plugin_for_tests import DoublingStrategy


class TriplingStrategy(DoublingStrategy):
    """Thrice the value of the one key there is."""

    name = "tripling"
    aliases = ()

    def compute_attention(self, query, key, value, **kwargs):
        """See the base class."""
        return (3 * value).expand_as(query)
