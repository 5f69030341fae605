"""What all pages for people share: templates, files, forms, and live fragments. The console and the playground use it.

A page is one template. Its blocks named `live_…` are its fragments: the page puts each into an element whose id is the
rest of the block's name. `GET` of a page renders everything. While a browser shows the page, `live.js` follows a stream
that sends each fragment again when its HTML has changed, and puts it in place by its id (`feed`). So one template says
what a page looks like, at first and later.

A change is a form: it is checked (`forms`), done, and answered with a redirect to the page that shows the effect. Pages
work without JavaScript; then they show the state of their last loading.

A fragment is the same for all who may see it. What belongs to one session, as the token of a form, stands outside the
fragments; a button in a fragment names its form by the attribute `form`.
"""
