"""Which activations carry what differs between two prompts: patched one at a time from one run into the other?"""
