"""What do linear probes of classes lose, or gain, when an SAE's latents for one class are ablated?"""
