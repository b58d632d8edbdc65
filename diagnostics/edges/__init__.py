"""Along which paths does what differs between two prompts travel: from which head or MLP into which, and does a circuit carry it all?"""
