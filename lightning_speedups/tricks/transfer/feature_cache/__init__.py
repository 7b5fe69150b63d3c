"""FeatureCache: the trick, where the frozen part ends, and the two kinds of steps."""
