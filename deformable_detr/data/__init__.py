"""Images and annotations in COCO format: finding them (`places`), reading (`annotations`, `images`,
`coco`), checking (`checks`, `picture_checks`, `split_checks`, `crowding`), converting (`voc`) and
preparing (`transforms`, `preparation`); and with a class for every pixel (`masks`).
Chapters training and your_own_data."""
