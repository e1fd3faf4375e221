"""What the laws share: tiny models, mixes of requests, engines, fake proposers, oracles, and the cover of the cases."""
