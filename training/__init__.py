"""How the models of this repository are made: what people run. `modeling_blip_rbm` never imports it."""
