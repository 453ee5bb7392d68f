"""Who decides how deep a model is: growth, a target loss, the search for few evaluations, trimming, leaving early."""
